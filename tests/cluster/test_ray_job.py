"""`ray job submit -- trireme up FILE` on a real Ray cluster of three nodes with token auth; a raylet is killed under load.

Minutes: `make test-ray-jobs`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.namespace import ROOT, run_inside, script
from tests.support.gang import short_folder

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1520)]


def test_a_deployment_as_a_ray_job() -> None:
    if shutil.which("ip") is None:
        pytest.skip("ip is needed: Ray would listen on every interface of this machine")
    bin_dir = str(Path(sys.executable).parent)
    settings = {"CPUS": "0 2 3", "DASHBOARD": "true", "NO_PROXY": "127.0.0.1", "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    with short_folder() as folder:
        nodes = ["bash", str(ROOT / "tests" / "cluster" / "three_nodes.sh"), bin_dir, str(folder)]
        command = [*nodes, *script("tests.cluster.jobs", str(folder))]
        steps = run_inside(["--net"], command, folder / "errors", env=settings, bound_s=1500)
    assert [line["step"] for line in steps] == [
        "a stranger without the token",
        "a job's exit code tells the class",
        "a job serves from the cluster that it runs on",
        "0 lost when a raylet dies under load",
        "the autoscaler sees the demand",
        "the layout is judged again when the cluster changes",
        "the gang is placed again on a living node",
        "a stopped job finishes what runs and leaves nothing",
        "a job that Ray kills leaves nothing",
    ]
