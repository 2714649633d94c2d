"""What a rank does between the agreed spec and the end: build its part of the engine, then lead or follow.

Owns the choice of the engine, the reaction to signals, and the ranks of a fake gang. Must never import an engine that the spec does not
name (torch costs 240 MB), and never leave the other ranks in a collective: an error while building is raised on all ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from array import array
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import msgspec

from workers import process
from workers.protocol.engine import Emission, Engine, EngineStats
from workers.protocol.errors import EngineFault, TriremeError
from workers.protocol.messages import Capacity, Submit
from workers.protocol.specs import ReplicaSpec, ResumeClass
from workers.sampling.grammar_checker import compiler
from workers.serving.leader import Leader
from workers.serving.router_io import KeyPair
from workers.serving.state_file import ErrorReport, Phase, StateFile

#: Seconds that a rank of the fake gang may keep the others waiting at the end, and bounds of its polling pause.
_CLOSE_S = 5.0
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.0001, 0.005


@runtime_checkable
class Follower(Protocol):
    """A rank other than 0."""

    def run(self) -> None:
        """Do what the leader says until it says stop."""


class _Meeting:
    """One tiny all-reduce a step, so that a stopped or dead rank stalls the fake gang as it would a real one."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def vote(self, go: bool, bound_s: float | None = None) -> bool:
        """Meet the other ranks; True when all vote to go on. Raises :class:`EngineFault` after ``bound_s`` seconds."""
        from mpi4py import MPI

        verdict = array("i", [go])
        request = self._comm.Iallreduce(MPI.IN_PLACE, verdict, MPI.MIN)
        begin, pause = time.monotonic(), _PAUSE_MIN_S
        while not request.Test():
            if bound_s is not None and time.monotonic() - begin > bound_s:
                raise EngineFault(f"a rank did not answer within {bound_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX_S)
        return bool(verdict[0])


class _FakeFollower:
    def __init__(self, meeting: _Meeting) -> None:
        self._meeting = meeting

    def run(self) -> None:
        while self._meeting.vote(True):
            pass


class _FakeGang:
    """The FakeEngine of rank 0, its every step taken together with the other ranks."""

    def __init__(self, engine: Engine, meeting: _Meeting) -> None:
        self._engine, self._meeting = engine, meeting

    @property
    def capacity(self) -> Capacity:
        return self._engine.capacity

    @property
    def resume(self) -> ResumeClass:
        return self._engine.resume

    def submit(self, id: int, request: Submit) -> None:
        self._engine.submit(id, request)

    def cancel(self, id: int) -> None:
        self._engine.cancel(id)

    def credit(self, id: int, tokens: int) -> None:
        self._engine.credit(id, tokens)

    def step(self) -> list[Emission]:
        self._meeting.vote(True)  # bounded by the leader's own watchdog
        return self._engine.step()

    def busy(self) -> bool:
        return self._engine.busy()

    def on_idle(self) -> None:
        self._engine.on_idle()

    def predicted_ms(self) -> float:
        return self._engine.predicted_ms()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._meeting.vote(False, _CLOSE_S)
        self._engine.close()


def agree(comm: Any, error: TriremeError | None) -> None:
    """Raise the same error on every rank when any rank has one: that of the lowest rank."""
    for data in process.gather(comm, b"" if error is None else msgspec.json.encode(ErrorReport.of(error))):
        if data:
            raise msgspec.json.decode(data, type=ErrorReport).error() from error


def build(spec: ReplicaSpec, comm: Any) -> Engine | Follower:
    """This rank's part of the engine: an Engine on rank 0, a Follower elsewhere. Raises the same TriremeError on every rank, or
    :class:`~workers.process.Alone` where the others cannot know."""
    match spec.engine.kind:
        case "fake":
            return _build_fake(spec, comm)
        case "portable":
            from workers.engines import portable

            return portable.build(spec, comm)
        case "trtllm":
            from workers.engines.trtllm import backend_choice

            return backend_choice.build(spec, comm)


def _build_fake(spec: ReplicaSpec, comm: Any) -> Engine | Follower:
    meeting = _Meeting(comm)
    engine: Engine | None = None
    error: TriremeError | None = None
    if comm.Get_rank() == 0:
        try:
            engine = _fake(spec)
        except TriremeError as failure:
            error = failure
    agree(comm, error)
    if engine is None:
        return _FakeFollower(meeting)
    return engine if comm.Get_size() == 1 else _FakeGang(engine, meeting)


def _fake(spec: ReplicaSpec) -> Engine:
    """The fake engine over the vocabulary of the artifact, or over bytes where that is a tokenizer alone."""
    from workers.artifacts.artifact import open_artifact
    from workers.engines.fake import BYTES, BYTES_EOS, FakeEngine

    tokenizer = Path(spec.artifact, "tokenizer.json")
    if not Path(spec.artifact, "config.json").exists():
        guides = compiler(tokenizer, BYTES, BYTES_EOS) if spec.artifact else None
        return FakeEngine(spec.engine, parallel=spec.parallel, guides=guides)
    artifact = open_artifact(spec.artifact)
    vocab, eos = artifact.model.vocab_size, artifact.eos_ids
    return FakeEngine(spec.engine, parallel=spec.parallel, vocab_size=vocab, eos_ids=eos, guides=compiler(tokenizer, vocab, eos))


class Signals:
    """SIGTERM and SIGINT. Rank 0: the first one drains a serving leader, any other ends the rank by SystemExit. Others ignore them: a
    launcher passes its own on to every rank, and the leader ends the others when it has drained."""

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

    Raises what :meth:`Leader.run` raises, and SystemExit when told to stop at once: the caller must then abort the world.
    """

    def die(error: TriremeError) -> None:
        # The engine thread may hang inside MPI: only the end of the process helps, and the launcher then ends the other ranks.
        state.enter("failed", error=error)
        process.tell(terminal, error.lines())
        os._exit(error.exit_code)

    def enter(phase: Phase) -> None:
        state.enter(phase, capacity=engine.capacity)

    # A waiting I/O thread gets its turn after 0.5 ms of pure Python instead of 5 ms: tokens leave while the next step is planned.
    sys.setswitchinterval(0.0005)
    leader = Leader(spec, engine, boot=uuid.uuid4().hex, keys=keys, enter=enter, die=die)
    signals.leader, signals.grace_s = leader, spec.drain_grace_s
    leader.run()
    engine.close()
