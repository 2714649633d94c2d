"""Gangs on a real Ray cluster of three nodes: launched, killed, adopted, spread over hosts, and gone at the end.

One cluster and one run of ``scenario.py`` serve all tests; each looks at one step. Skipped where a network namespace cannot be made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1520)]

HERE = Path(__file__).resolve().parent
UNSHARE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
STEPS = (
    "curve over tcp", "answer over three hosts", "deployment down", "two gangs", "rank killed", "controller killed", "supervisor killed",
    "three hosts", "far rank killed", "pre-flight refuses", "abort", "nothing left",
)  # fmt: skip


@pytest.fixture(scope="module")
def done() -> Iterator[dict[str, dict[str, object]]]:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip are needed: Ray would listen on every interface of this machine")
    allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=20, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"no network namespace here: {allowed.stderr.strip()}")
    tmp = Path(tempfile.mkdtemp(prefix="tr", dir="/tmp"))
    (tmp / "run").mkdir(mode=0o700)
    bin_dir = str(Path(sys.executable).parent)
    command = [
        *UNSHARE,
        "bash",
        str(HERE / "three_nodes.sh"),
        bin_dir,
        str(tmp),
        sys.executable,
        str(HERE / "scenario.py"),
        str(tmp / "run"),
    ]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    env.pop("RAY_ADDRESS", None)
    try:
        with open(tmp / "errors", "w+") as errors:
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=1500, check=False, env=env)
            errors.seek(0)
            text = errors.read()
        steps = {line["step"]: line for line in map(json.loads, filter(lambda x: x.startswith('{"step"'), ended.stdout.splitlines()))}
        for step in steps.values():
            print(step)
        steps["error"] = {"detail": "" if ended.returncode == 0 else text[-6000:]}
        yield steps
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@pytest.mark.parametrize("step", STEPS)
def test_step(done: dict[str, dict[str, object]], step: str) -> None:
    assert step in done, f"the scenario ended before this step:\n{done['error']['detail']}"


def test_the_scenario_ended_well(done: dict[str, dict[str, object]]) -> None:
    assert done["error"]["detail"] == ""
