"""Jobs on a real Slurm of three nodes: submitted, asked, cancelled, requeued, handed over at the time limit.

`make test-slurm`: 10 to 15 minutes. Each part has a Slurm and a network namespace of its own; `scenario.py` does what a user
would do. Skipped where there is no Slurm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1520)]

HERE = Path(__file__).resolve().parent
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
#: CPUs of each node, and the steps that must have been.
PARTS = {
    "refusal": (2, ("pre-flight refuses",)),
    "allocation": (2, ("endpoint of three nodes", "answers over both doors", "scancel leaves nothing", "TERM drains and ends with 0")),
    "requeue": (3, ("requeued with new epochs",)),
    "array": (2, ("an array of replicas",)),
    "handover": (3, ("hand-over, fake engine",)),
    "handover-ray": (3, ("hand-over, a Ray each",)),
    "engine": (3, ("hand-over, portable engine",)),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str) -> None:
    pytest.importorskip("ray")
    if missing := [program for program in ("slurmctld", "slurmd", "munged", "unshare", "ip") if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}; make test-slurm installs what Debian and Ubuntu carry")
    allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=20, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"no network namespace here: {allowed.stderr.strip()}")
    cpus, wanted = PARTS[part]
    tmp = Path(tempfile.mkdtemp(prefix="tr", dir="/tmp"))
    command = [
        *UNSHARE,
        "bash",
        str(HERE / "cluster.sh"),
        str(tmp),
        str(cpus),
        sys.executable,
        "-m",
        "tests.slurm.scenario",
        str(tmp),
        part,
    ]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and not name.startswith(("SLURM_", "SBATCH_"))}
    root = str(HERE.parent.parent)
    try:
        with open(tmp / "errors", "w+") as errors:
            ended = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=1500,
                check=False,
                cwd=root,
                env=env | {"PYTHONPATH": root},
            )
            errors.seek(0)
            text = errors.read()
        steps = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"step"')]
        for step in steps:
            print(step)
        assert ended.returncode == 0, text[-12000:]
        assert tuple(step["step"] for step in steps) == wanted
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
