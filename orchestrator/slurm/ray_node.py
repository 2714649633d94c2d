"""Ray on one node of a job: `ray start --block` as a child that runs when its output says so, and is removed with all its files.

Owns that child and its temporary folder. Token authentication is on; the token is a file and never an argument.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.control.launch.subprocesses import ChildProcess
from orchestrator.slurm.job_env import JobPosition
from workers.protocol.errors import EnvironmentFault

_OBJECT_STORE_BYTES = 80 << 20
_STARTED = "Ray runtime started."
_STOP_S = 20.0
_POLL_S = 0.2


def environment(base: Mapping[str, str], place: JobPosition, token: Path) -> dict[str, str]:
    """What Ray and everything that joins it must know: where it is, and where the token lies."""
    own = {
        "RAY_ADDRESS": f"{place.head}:{place.ray_port}",
        "TRIREME_RAY_ADDRESS": f"{place.head}:{place.ray_port}",  # over what the deployment file says
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {name: value for name, value in base.items() if name != "RAY_AUTH_TOKEN"} | own


def own_address(head: str, port: int) -> str:
    """The address at which the first node, and so every other one, sees this one. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, port))
        return str(probe.getsockname()[0])


class RayNode:
    """Runs from construction on; :meth:`started` waits. ``log``: everything that `ray start` says."""

    def __init__(self, place: JobPosition, env: Mapping[str, str], log: Path) -> None:
        """Raises :class:`EnvironmentFault` when Ray is not installed."""
        self._folder = tempfile.mkdtemp(prefix="tr", dir="/tmp")  # short: Ray puts sockets there, whose paths end at 107 bytes
        self._up = threading.Event()
        self._log = open(log, "a", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115 - closed in stop
        program = Path(sys.executable).with_name("ray")
        where = (
            ["--head", f"--port={place.ray_port}", "--include-dashboard=false"] if not place.index else [f"--address={env['RAY_ADDRESS']}"]
        )
        argv = [
            str(program), "start", "--block", "--disable-usage-stats", *where,
            f"--node-ip-address={own_address(place.head, place.roll_port)}", f"--num-cpus={place.cpus}", f"--num-gpus={place.gpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={_free_port()}", f"--temp-dir={self._folder}",
            "--min-worker-port=0", "--max-worker-port=0",  # any free one: other jobs' Rays may be on this node
        ]  # fmt: skip
        # With its own address in the environment, `ray start --head` would take it for an existing cluster.
        self._child = ChildProcess(argv, env={name: value for name, value in env.items() if name != "RAY_ADDRESS"}, on_line=self._on_output)

    def _on_output(self, line: str) -> None:
        self._log.write(line + "\n")
        self._log.flush()
        if _STARTED in line:
            self._up.set()

    def started(self, bound_s: float, check_stop: Callable[[], None]) -> None:
        """Raises :class:`EnvironmentFault` when it ends first or takes longer than ``bound_s``."""
        deadline = time.monotonic() + bound_s
        while not self._up.wait(_POLL_S):
            check_stop()
            if (code := self._child.returncode) is not None:
                raise EnvironmentFault(f"ray start ended with {code}", "", f"its log: {self._log.name}")
            if time.monotonic() > deadline:
                raise EnvironmentFault(f"Ray did not start within {bound_s:.0f} s", "", f"its log: {self._log.name}")

    @property
    def runs(self) -> bool:
        return self._child.returncode is None

    def stop(self) -> None:
        """End it and all of its processes; bounded."""
        self._child.signal(signal.SIGTERM)
        if self._child.wait(_STOP_S) is None:
            self._child.signal(signal.SIGKILL, group=True)
            self._child.wait(_STOP_S)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
