"""The life of a rank after the spec is agreed: build its part of the engine, then lead or follow.

Owns the choice of the engine and the signal handlers. Must never import an engine that the spec does not name (torch costs 240 MB), and
never leave the other ranks in a collective: an error during the build is raised on all ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from types import FrameType
from typing import Any

from workers import process
from workers.protocol.engine import Engine, Follower
from workers.protocol.errors import TriremeError
from workers.protocol.specs import FakeSpec, PortableSpec, ReplicaSpec, TrtllmSpec
from workers.protocol.status import RankPhase
from workers.serving.leader import Leader
from workers.serving.router_io import KeyPair
from workers.serving.state_file import StateFile


def build(spec: ReplicaSpec, comm: Any) -> Engine | Follower:
    """This rank's part of the engine: an Engine on rank 0, a Follower elsewhere. Raises the same TriremeError on every rank, or
    :class:`~workers.process.Alone` if the others cannot know the error."""
    match spec.engine:
        case FakeSpec():
            from workers.engines import fake_gang

            return fake_gang.build(spec, comm)
        case PortableSpec():
            from workers.engines import portable

            return portable.build(spec, comm)
        case TrtllmSpec():
            from workers.engines.trtllm import backend_choice

            return backend_choice.build(spec, comm)


class Signals:
    """Handlers of SIGTERM and SIGINT. On rank 0 the first signal drains a serving leader, any other ends the rank by SystemExit. Other
    ranks ignore both signals: a launcher forwards its own signals to every rank, and the leader ends the others after the drain."""

    def __init__(self, rank: int) -> None:
        self.leader: Leader | None = None
        self.grace_s = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal if rank == 0 else signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        leader, self.leader = self.leader, None
        if leader is None:
            raise SystemExit(0)
        leader.drain(self.grace_s)


def lead(spec: ReplicaSpec, engine: Engine, *, keys: KeyPair | None, state: StateFile, terminal: int, signals: Signals) -> None:
    """Rank 0's life with a loaded engine; returns when the replica has drained and the engine is closed on every rank.

    Raises what :meth:`Leader.run` raises, and SystemExit when a signal ends it at once: the caller must then abort the world.
    """

    def abort(error: TriremeError) -> None:
        # The engine thread may hang inside MPI: then only the end of the process helps, after which the launcher ends the other ranks.
        state.enter("failed", error=error)
        process.tell(terminal, error.lines())
        os._exit(error.exit_code)

    def enter(phase: RankPhase) -> None:
        state.enter(phase, capacity=engine.capacity)

    # The I/O thread waits at most 0.5 ms for the interpreter's lock instead of 5 ms, so tokens are sent while the next step is planned.
    sys.setswitchinterval(0.0005)
    leader = Leader(spec, engine, boot=uuid.uuid4().hex, keys=keys, enter=enter, abort=abort)
    signals.leader, signals.grace_s = leader, spec.drain_grace_s
    leader.run()
    engine.close()
