"""Rank 0's shell around an engine: the engine thread, which gets events from the I/O thread of :mod:`workers.serving.router_io`.

Owns the :class:`~workers.serving.stream_table.StreamTable`, and the step's progress and the statistics, which the I/O thread reads for
heartbeats. Every engine call (and so every MPI call) is made by the thread that calls :meth:`Leader.run`. Must never touch a socket, and
never wait without a bound: when idle it sleeps on its event queue, and the I/O thread ends the process if a step makes no progress
(:meth:`Leader._check_progress`).
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import TypeAlias, assert_never

import msgspec

from workers.protocol.engine import STATS_AGE_S, Engine
from workers.protocol.errors import EngineFault, ReplicaLost, TriremeError
from workers.protocol.hang import hang_bound_ms
from workers.protocol.messages import PROTOCOL, Attach, Bye, Cancel, Credit, Heartbeat, Hello, Submit
from workers.protocol.specs import ReplicaSpec
from workers.protocol.status import EngineStats, RankPhase
from workers.serving.router_io import Event, KeyPair, RouterGone, RouterIo
from workers.serving.stream_table import Action, BeginDrain, GrantCredit, LogFault, SendToRouter, StartSequence, StopSequence, StreamTable

#: Longest sleep of an idle engine thread, seconds.
IDLE_S = 0.5
#: Maximum number of live sequences: the first number for each place in a batch, and at least the second number.
SEQUENCES_PER_SLOT, MIN_SEQUENCES = 32, 1024
#: Events handled between two steps.
TURN_EVENTS = 1024

log = logging.getLogger("trireme.leader")


class StepProgress(msgspec.Struct, frozen=True):
    """Progress of the engine thread: ``step`` number, start time (:attr:`RouterIo.now`; 0 = not in a step), and predicted duration."""

    step: int = 0
    since: float = 0.0
    predicted_ms: float = 0.0


class LeaderStats(msgspec.Struct, frozen=True):
    """The engine's statistics, at most ``STATS_AGE_S`` old while steps run, and whether the leader drains."""

    engine: EngineStats
    draining: bool


_Inbox: TypeAlias = "queue.SimpleQueue[tuple[float, Event | BeginDrain]]"


class Leader:
    """One replica's leader; :meth:`run` is its life.

    Args:
        spec: heartbeat, hang floor, routers, name, epoch.
        engine: driven from the thread that calls :meth:`run` and closed by the caller.
        boot: this process's nonce.
        keys: for ``tcp://`` routers.
        enter: called from the engine thread at the start of each phase. abort: called from the I/O thread if the replica must end at once;
        must not return.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        engine: Engine,
        *,
        boot: str,
        keys: KeyPair | None,
        enter: Callable[[RankPhase], None],
        abort: Callable[[TriremeError], None],
    ) -> None:
        self._spec, self._engine, self._boot, self._enter, self._abort = spec, engine, boot, enter, abort
        limit = max(MIN_SEQUENCES, SEQUENCES_PER_SLOT * engine.capacity.max_batch_size)
        self._streams = StreamTable(boot=boot, model=spec.model, limit=limit)
        self._hello = Hello(
            boot=boot,
            protocol=PROTOCOL,
            replica=spec.announced or spec.name,
            model=spec.model,
            epoch=spec.epoch,
            resume=engine.resume,
            capacity=engine.capacity,
        )
        self._inbox: _Inbox = queue.SimpleQueue()
        self._progress = StepProgress()
        self._stats = LeaderStats(engine.stats(), False)
        self._stats_at = 0.0
        self._routers = RouterIo(self, spec.routers, keys, boot=boot, heartbeat_s=spec.heartbeat_s)

    def drain(self, grace_s: float) -> None:
        """Begin to drain; may be called from a signal handler and from any thread."""
        self._inbox.put((self._routers.now, BeginDrain(max(0.0, grace_s))))

    def run(self) -> None:
        """Serve until drained. Raises :class:`ReplicaLost` if a newer epoch lives, and the errors of the engine's ``step``."""
        bye_reason = "lost"
        self._routers.start()
        self._enter("ready")
        try:
            while not (self._streams.draining and not len(self._streams)):
                self._take_events()
                now = self._routers.now
                self._act(self._streams.expire(now))
                if self._engine.busy():
                    self._step(now)
                else:
                    self._refresh(now)
            bye_reason = "drained"
        finally:
            # Also after an error: a router that waits for a sequence must learn that it continues elsewhere.
            self._progress = StepProgress(self._progress.step)
            self._streams.drain(self._routers.now, 0.0)
            for action in self._streams.expire(self._routers.now):
                if isinstance(action, SendToRouter):
                    self._routers.post(action.router_boot, action.message)
            self._routers.close(bye_reason)

    def _take_events(self) -> None:
        """Handle received events. If there is nothing to do, sleep until an event arrives or is due, and run the engine's idle work if none
        arrived."""
        idle = not self._engine.busy()
        try:
            for _ in range(TURN_EVENTS):
                received, event = self._inbox.get(idle, self._sleep_bound_s() if idle else None)
                self._handle(received, event)
                idle = False
        except queue.Empty:
            if idle:
                self._engine.on_idle()

    def _sleep_bound_s(self) -> float:
        due = self._streams.next_due()
        return IDLE_S if due is None else min(IDLE_S, max(0.0, due - self._routers.now))

    def _handle(self, received: float, event: Event | BeginDrain) -> None:
        match event:
            case Submit():
                self._act(self._streams.submit(event, received))
            case Attach():
                self._act(self._streams.attach(event))
            case Cancel():
                self._act(self._streams.cancel(event))
            case Credit():
                self._act(self._streams.credit(event))
            case RouterGone(boot=boot):
                self._streams.router_lost(boot, received)
            case BeginDrain(grace_s=grace_s):
                self._begin_drain(received, grace_s)
            case Bye():
                raise ReplicaLost("a newer epoch of this replica lives", f"a router refused epoch {self._spec.epoch}")
            case _:
                assert_never(event)

    def _begin_drain(self, now: float, grace_s: float) -> None:
        if not self._streams.draining:
            log.info("draining: %d sequences, grace %.1f s", len(self._streams), grace_s)
            self._enter("draining")
        self._streams.drain(now, grace_s)

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendToRouter(router_boot=router_boot, message=message):
                    self._routers.post(router_boot, message)
                case StartSequence(id=id, submit=submit):
                    self._start(id, submit)
                case StopSequence(id=id):
                    self._engine.cancel(id)
                case GrantCredit(id=id, tokens=tokens):
                    self._engine.credit(id, tokens)
                case LogFault():
                    _log_fault(action)
                case _:
                    assert_never(action)

    def _start(self, id: int, submit: Submit) -> None:
        try:
            self._engine.submit(id, submit)
        except TriremeError as error:
            self._act(self._streams.refused(id, error))
        else:
            self._act(self._streams.started(id))

    def _step(self, now: float) -> None:
        number = self._progress.step + 1
        self._progress = StepProgress(number, self._routers.now, self._engine.predicted_ms())
        emissions = self._engine.step()
        self._progress = StepProgress(number)
        self._act(self._streams.emitted(emissions))
        if now - self._stats_at > STATS_AGE_S:
            self._refresh(now)

    def _refresh(self, now: float) -> None:
        self._stats = LeaderStats(self._engine.stats(), self._streams.draining)
        self._stats_at = now

    # called by the I/O thread: these methods only read the progress and the statistics, which are replaced atomically, and queue events

    def hello(self) -> Hello:
        return self._hello

    def heartbeat(self) -> Heartbeat:
        """The present heartbeat. Raises :class:`EngineFault` if the running step makes no progress."""
        progress, stats = self._progress, self._stats
        busy_s = self._routers.now - progress.since if progress.since else 0.0
        self._check_progress(progress, busy_s)
        return Heartbeat(
            boot=self._boot,
            step=progress.step,
            busy_ms=busy_s * 1000.0,
            predicted_ms=progress.predicted_ms,
            draining=stats.draining,
            stats=stats.engine,
        )

    def _check_progress(self, progress: StepProgress, busy_s: float) -> None:
        """Detect a hung rank: raises :class:`EngineFault` when a step, running for ``busy_s``, takes longer than :func:`hang_bound_ms`
        allows. The I/O thread then ends the process."""
        if busy_s * 1000.0 > hang_bound_ms(self._spec.hang_floor_s, progress.predicted_ms):
            raise EngineFault(
                f"step {progress.step} has made no progress for {busy_s:.1f} s",
                f"it was expected to take {progress.predicted_ms:.0f} ms: a rank hangs or was stopped",
                "the replica is replaced whole",
            )

    def deliver(self, received: float, event: Event) -> None:
        self._inbox.put((received, event))

    def backlog(self) -> int:
        return self._inbox.qsize()

    def on_io_error(self, error: BaseException) -> None:
        log.error("the I/O thread ends", exc_info=error)
        self._abort(error if isinstance(error, TriremeError) else EngineFault("the leader's I/O thread failed", repr(error)))


def _log_fault(action: LogFault) -> None:
    request_id, (caller_id, trace_id), fault = action.request_id, action.marks, action.fault
    extra = {"request_id": caller_id or request_id} | ({"trace_id": trace_id} if trace_id else {})
    log.warning("request %s failed: %s: %s", ascii(request_id), fault.code, fault.message, extra=extra)
