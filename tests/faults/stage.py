"""A deployment to break: signals to any of its processes, and how long it takes until each party has noticed and fixed it.

Owns the deployment. What it measures are times at which a router or the host *showed* something, polled every 20 ms.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, ReplicaRow
from orchestrator.control.launch.subprocesses import alive, tagged
from orchestrator.control.reconciler import Reconciler, RestartPolicy
from tests.support.deployment import deployed, wait_for_state, write_config
from tests.support.figures import figure
from tests.support.gang import short_folder, wait_for
from workers.epoch import started_at

#: Test settings: hang floor, silence, drain grace; and no request is suspected, since the tests kill on purpose.
SETTINGS: dict[str, object] = {
    "hang_floor_s": 2.0,
    "replica_timeout_s": 1.0,
    "drain_grace_s": 5,
    "admission": {"replica_limit": 100},
}
#: Bounds of a quiet machine, seconds: to notice a death, to the next token after it and after a hang, and to be whole again beyond what a
#: start takes and the back-off.
DETECTION_S, NEXT_TOKEN_S, HANG_S, READY_S = 0.5, 1.0, 3.0, 10.0
_POLL_S = 0.02


class Strike(msgspec.Struct, frozen=True):
    """A fault: who was hit, when, and when a router had lost it."""

    old: ReplicaRow
    #: Seconds from the old gang's launch to its being ready: what a start takes on this machine.
    start: float
    at: float
    lost: float

    @property
    def detection(self) -> float:
        return self.lost - self.at


class Healed(msgspec.Struct, frozen=True):
    """The end of a fault: when the last process of the old gang was gone, and when a router had its successor."""

    strike: Strike
    gone: float
    ready: float
    phases: tuple[str, ...]

    def figures(self, what: str, pause: float | None, *, detection: float = DETECTION_S, next_token: float = NEXT_TOKEN_S) -> None:
        """Note the figures of one fault and check them; ``pause`` as :meth:`Arrivals.pause` has it, None where no stream had begun."""
        at, back_off = self.strike.at, back_off_s(self.strike.old)
        figure(f"{what} -> detection", self.strike.detection, detection)
        if pause is not None:
            figure(f"{what} -> next token at the client", pause, next_token)
        figure(f"{what} -> no process left of the gang", self.gone - at, detection + 2.0)
        figure(f"{what} -> replica ready (back-off {back_off:g} s)", self.ready - at, round(READY_S + back_off + self.strike.start, 1))


def back_off_s(row: ReplicaRow) -> float:
    """Seconds that the controller waits before it launches the replica again, should it fail now."""
    return Reconciler(RestartPolicy()).delay(row.failures + 1, was_ready=True)


class Stage:
    """The living deployment in ``folder``."""

    def __init__(self, control: ControlClient, status: DeploymentStatus, folder: Path) -> None:
        self.control, self.status, self.folder = control, status, folder
        self._http = httpx.Client(base_url=status.url, trust_env=False, timeout=10)

    def close(self) -> None:
        self._http.close()

    def ready(self, bound_s: float = 120.0) -> DeploymentStatus:
        self.status = wait_for_state(self.control, "READY", bound_s)
        return self.status

    def row(self, replica: str) -> ReplicaRow:
        return next(row for model in self.control.status().models for row in model.replicas if row.name == replica)

    def pid(self, replica: str, rank: int) -> int:
        return next(pid for number, _, pid in self.row(replica).pids if number == rank)

    def gang(self, replica: str) -> list[int]:
        """Every process of a gang: mpiexec, its proxy, ranks and what they started."""
        return tagged(f"{self.status.name}/{replica}/{self.row(replica).epoch}")

    def mpiexec(self, replica: str) -> int:
        """Process id of a gang's launcher."""
        return next(pid for pid in self.gang(replica) if "mpiexec" in psutil.Process(pid).name())

    def router(self) -> dict[str, Any]:
        """What the router says of itself."""
        return dict(self._http.get("/status").json())

    def seen(self, replica: str) -> dict[str, Any]:
        """One replica in the router's eyes."""
        return next(row for row in self.router()["replicas"] if row["name"] == replica)

    def check_memory(self, replica: str) -> None:
        """Shared memory that a gang has mapped has no name any more: whoever is killed now leaves none."""
        for _, _, pid in self.row(replica).pids:
            named = [line for line in Path("/proc", str(pid), "maps").read_text().splitlines() if "/dev/shm/" in line]
            assert all(line.endswith(" (deleted)") for line in named), named

    def strike(self, replica: str, pid: int, number: signal.Signals = signal.SIGKILL) -> Strike:
        """Send a signal to a process of a replica that is at work, and wait until the router has lost it."""
        self._until(lambda: self.seen(replica)["running"] > 0, f"something to do for {replica}")
        self.check_memory(replica)
        old = self.row(replica)
        start = time.time() - old.age_s - started_at(old.epoch)
        at = time.monotonic()
        os.kill(pid, number)

        def lost() -> bool:
            seen = self.seen(replica)
            return bool(seen["state"] == "lost" or seen["epoch"] > old.epoch)

        self._until(lost, f"the loss of {replica}")
        return Strike(old, start, at, time.monotonic())

    def heal(self, strike: Strike) -> Healed:
        """Wait until nothing is left of the old gang and the router has the new one."""
        pids = [pid for _, _, pid in strike.old.pids]
        tag = f"{self.status.name}/{strike.old.name}/{strike.old.epoch}"
        gone = 0.0
        phases: list[str] = []

        def whole() -> bool:
            nonlocal gone
            row = self.row(strike.old.name)
            if not phases or phases[-1] != row.state:
                phases.append(row.state)
            if not gone and not any(map(alive, pids)) and not tagged(tag):
                gone = time.monotonic()
            seen = self.seen(strike.old.name)
            if seen["epoch"] > strike.old.epoch:
                assert gone, "two gangs on one slot"
            return bool(seen["state"] == "ready" and seen["epoch"] > strike.old.epoch)

        self._until(whole, f"the successor of {strike.old.name}", 120.0)
        return Healed(strike, gone, time.monotonic(), tuple(phases))

    @staticmethod
    def _until(condition: Callable[[], bool], what: str, bound_s: float = 120.0) -> None:
        deadline = time.monotonic() + bound_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {bound_s} s"
            time.sleep(_POLL_S)


@contextmanager
def staged(*, deployment: dict[str, object] | None = None, module: str = "trireme", **changes: object) -> Iterator[Stage]:
    """A deployment with the settings of the fault tests; afterwards neither a process nor a socket of it is left. ``module``: what stands
    for the command."""
    with short_folder() as folder:
        file = write_config(folder, deployment=SETTINGS | (deployment or {}), **changes)
        with deployed(file, module=module) as (control, status):
            stage = Stage(control, status, folder)
            try:
                yield stage
                pids = {pid for row in (row for model in control.status().models for row in model.replicas) for pid in stage.gang(row.name)}
            finally:
                stage.close()
        wait_for(lambda: not any(map(alive, pids)), 5.0, "the end of every rank")
        left = [path for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
        assert left == [], f"sockets are left: {left}"
