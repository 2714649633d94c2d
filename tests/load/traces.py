"""Everything that a deployment puts on the host, so that it can be shown to be gone. Owns the names that were seen."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from orchestrator.control.host.control_socket import DeploymentStatus
from orchestrator.control.launch.subprocesses import tagged

SHARED = "/dev/shm/"


class Traces:
    """Processes, gangs and shared-memory segments of one deployment, whenever it was looked at."""

    def __init__(self) -> None:
        self._processes: dict[int, float] = {}
        self._gangs: set[str] = set()
        self._segments: set[str] = set()

    def look(self, status: DeploymentStatus) -> None:
        rows = [row for model in status.models for row in model.replicas]
        self._gangs |= {f"{status.name}/{row.name}/{row.epoch}" for row in rows}
        for pid in (status.pid, *status.routers.values(), *(pid for row in rows for _, _, pid in row.pids)):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                self._processes[pid] = psutil.Process(pid).create_time()
                maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
                self._segments |= {line.split(maxsplit=5)[5] for line in maps if SHARED in line and not line.endswith("(deleted)")}

    def left(self, folder: Path) -> list[str]:
        """What is still there after the deployment's end; ``folder``: where its sockets were."""
        found = []
        for pid, born in self._processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"process {pid}: {process.name()}")
        found += [f"process {pid} of gang {gang}" for gang in sorted(self._gangs) for pid in tagged(gang)]
        found += [f"segment {path}" for path in sorted(self._segments) if Path(path).exists()]
        return found + [f"socket {path.name}" for path in folder.rglob("*") if path.is_socket()]
