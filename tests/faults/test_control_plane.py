"""F10, F11: GCS, a raylet and the host process are killed under load, on three raylets in a network namespace."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.namespace import ROOT, run_inside, script
from tests.support.gang import short_folder

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


def test_streams_outlive_the_control_plane() -> None:
    if shutil.which("ip") is None:
        pytest.skip("ip is needed: Ray would listen on every interface of this machine")
    with short_folder() as folder:
        (folder / "run").mkdir(mode=0o700)
        nodes = ["bash", str(ROOT / "tests" / "cluster" / "three_nodes.sh"), str(Path(sys.executable).parent), str(folder)]
        steps = run_inside(
            ["--net"],
            [*nodes, *script("tests.faults.control_plane", str(folder / "run"))],
            folder / "errors",
            env={"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")},
            bound_s=800,
        )
    assert [line["step"] for line in steps] == [
        "two gangs on three nodes",
        "streams finish without GCS",
        "the control plane works again",
        "a raylet's death moves its gang",
        "a new host adopts the gangs",
        "the reconnect limit",
        "the host ends when Ray gives up",
    ]
