"""The state file of one replica: rank 0's report to the launcher.

Owns ``run_dir/state.json``: written atomically, by rank 0 only, mode 0600. A killed gang cannot write its own end: if the phase is a living
one and no process of ``pids`` exists, the gang was killed. Must never interrupt serving: while it serves, a full disk is only a warning.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from workers.files import replace_file
from workers.protocol.errors import EnvironmentFault, ErrorReport, TriremeError
from workers.protocol.messages import Capacity
from workers.protocol.status import RankPhase

STATE_FILE = "state.json"

log = logging.getLogger("trireme.state")


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """``pids``: (rank, host, pid) of the whole gang. ``since``: Unix time at which the phase began, seconds."""

    phase: RankPhase
    epoch: int
    name: str
    pids: list[tuple[int, str, int]]
    capacity: Capacity | None = None
    error: ErrorReport | None = None
    since: float


class StateFile:
    """Writer of the file; without a ``run_dir`` it writes nothing."""

    def __init__(self, run_dir: str, *, name: str, epoch: int, pids: list[tuple[int, str, int]]) -> None:
        self._path = Path(run_dir, STATE_FILE) if run_dir else None
        self._name, self._epoch, self._pids = name, epoch, pids
        self._capacity: Capacity | None = None
        self._serving = False

    def enter(self, phase: RankPhase, *, capacity: Capacity | None = None, error: TriremeError | None = None) -> None:
        """Begin a phase. Raises :class:`EnvironmentFault` when the file cannot be written before the replica has ever been ready."""
        self._capacity = capacity or self._capacity
        report = None if error is None else ErrorReport.of(error)
        state = ReplicaState(
            phase=phase,
            epoch=self._epoch,
            name=self._name,
            pids=self._pids,
            capacity=self._capacity,
            error=report,
            since=time.time(),
        )
        try:
            if self._path is not None:
                replace_file(self._path, msgspec.json.encode(state))
            self._serving |= phase == "ready"
        except OSError as failure:
            if not self._serving and phase != "failed":
                raise EnvironmentFault(f"cannot write {self._path}", failure.strerror or str(failure)) from None
            log.warning("cannot write %s: %s; phase %s goes unreported", self._path, failure.strerror, phase)


def read_state(run_dir: str) -> ReplicaState | None:
    """The state of the replica in ``run_dir``; None while there is none. Raises :class:`EnvironmentFault` on a file that is not one."""
    path = Path(run_dir, STATE_FILE)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReplicaState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise EnvironmentFault(f"cannot read {path}", str(error)) from None
