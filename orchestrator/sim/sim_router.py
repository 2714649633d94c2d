"""One simulated router: a routing core in a simulated shell, killed and started again, and the calls that clients made there.

Owns the :class:`~orchestrator.router.core.router_core.RouterCore` of the present process. It passes events to it and carries out its
actions like :mod:`orchestrator.router.dispatcher`, and decides nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.actions import (
    Action,
    DeliverCachedTokens,
    DeliverPromptLogprobs,
    DeliverTokens,
    FailChoice,
    FinishChoice,
    SendMessage,
)
from orchestrator.router.core.events import (
    AbortAll,
    AddCredit,
    CancelRequest,
    PeerUnreachable,
    ReplicaMessage,
    RouterEvent,
    StopAccepting,
    StopChoice,
    SubmitRequest,
    Tick,
)
from orchestrator.router.core.recorder import DumpPart, EventRecorder
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.core.session_table import session_key
from orchestrator.sim.sim_network import SimConnection
from orchestrator.sim.sim_replica import HANG_FLOOR_S, HEARTBEAT_S
from orchestrator.sim.timeline import Timeline
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, FromReplica, Logprobs, RouterHeartbeat, ToReplica, Usage

TICK_S, REPLICA_TIMEOUT_S, ACCEPT_S = 0.2, 1.0, 2.0
#: A router proves its indexes after every so many turns, and whenever it is idle.
CHECK_TURNS = 16


class SimCaller(Protocol):
    """Who waits for a call."""

    def on_tokens(self, call: SimCall, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None: ...

    def on_finished(self, call: SimCall, choice: int, reason: FinishReason, usage: Usage) -> None: ...

    def on_errored(self, call: SimCall, choice: int, error: TriremeError) -> None: ...

    def on_lost(self, call: SimCall) -> None:
        """The router is gone."""


class SimCall:
    """One request at one life of a router. ``granted``: tokens a choice that may be delivered; ``over``: choices that expect nothing."""

    def __init__(self, caller: SimCaller, router: SimRouter, id: int, request: RouterRequest) -> None:
        self.caller, self._router, self.id, self.request = caller, router, id, request
        self.life = router.life
        self.granted = request.credit
        self.over: set[int] = set()

    @property
    def alive(self) -> bool:
        return self._router.up and self._router.life == self.life and self.id in self._router.calls

    def cancel(self) -> None:
        if self.alive:
            self.over |= set(range(self.request.n))
            self._router.cancel(self)

    def stop_choice(self, choice: int) -> None:
        if self.alive:
            self.over.add(choice)
            self._router.stop_choice(self, choice)

    def credit(self, tokens: int) -> None:
        if self.alive:
            self.granted += tokens
            self._router.credit(self, tokens)


class SimRouter:
    """``up`` while it lives, which may be several times. ``counts``: of all its lives. ``window_events``: events that are recorded of each
    life, 0 = none; ``dumps``: what was recorded of the lives that are over."""

    def __init__(self, index: int, timeline: Timeline, max_queue: int, window_events: int = 0) -> None:
        self.index, self._timeline, self._window_events = index, timeline, window_events
        self._max_queue = max_queue
        self.dumps: list[list[DumpPart]] = []
        self.up = False
        self.life = 0
        self.connections: dict[bytes, SimConnection] = {}
        self.calls: dict[int, SimCall] = {}
        self.counts: dict[str, int] = {}
        self._requests = self._turns = 0
        self._actions: list[Action] = []

    def start(self) -> None:
        self.life += 1
        self.up = True
        self._greeting = RouterHeartbeat(boot=f"router{self.index}.{self.life}", router=f"router{self.index}")
        # Losses because of bounds (of a queue, of a request's deaths) are for other tests: here every request must succeed.
        admission = AdmissionSpec(max_queue=self._max_queue, queue_timeout_s=0.0, request_timeout_s=0.0, replica_limit=1000)
        self.core = RouterCore(self._greeting, ["m"], admission, ReplicaRegistry(REPLICA_TIMEOUT_S, HANG_FLOOR_S), accept_s=ACCEPT_S)
        self._recorder = EventRecorder(self.core, window_events=self._window_events) if self._window_events else None
        self._actions = []
        self._tick(self.life)
        self._send_heartbeats(self.life)

    # --- what clients do

    def submit(self, caller: SimCaller, request: RouterRequest) -> SimCall:
        """Raises as :meth:`RouterCore.handle`."""
        self._requests += 1
        self._handle(SubmitRequest(id=self._requests, request=request, session=session_key(request)))
        call = self.calls[self._requests] = SimCall(caller, self, self._requests, request)
        return call

    def cancel(self, call: SimCall) -> None:
        del self.calls[call.id]
        self._handle(CancelRequest(id=call.id))

    def stop_choice(self, call: SimCall, choice: int) -> None:
        if len(call.over) == call.request.n:
            del self.calls[call.id]
        self._handle(StopChoice(id=call.id, choice=choice))

    def credit(self, call: SimCall, tokens: int) -> None:
        self._handle(AddCredit(ids=[call.id], tokens=[tokens]))

    # --- what replicas say

    def hear(self, peer: bytes, message: FromReplica) -> None:
        if self.up:
            self._take_in(ReplicaMessage(peer=peer, user="", message=message))
            self._pump(self.life)

    def _tick(self, life: int) -> None:
        if self.up and self.life == life:
            self._take_in(Tick())
            self._pump(life)
            self._timeline.after(TICK_S, partial(self._tick, life))

    def _send_heartbeats(self, life: int) -> None:
        if self.up and self.life == life:
            for replica in list(self.core.registry.replicas.values()):
                if replica.state != "lost" and replica.peer:
                    self._send(replica.peer, self._greeting)
            self._pump(life)
            self._timeline.after(HEARTBEAT_S, partial(self._send_heartbeats, life))

    # --- events in, actions out

    def _take_in(self, event: RouterEvent) -> None:
        self._actions += (self._recorder or self.core).handle(event, self._timeline.now)

    def _handle(self, event: RouterEvent) -> None:
        """Give the core an event of a client; the client gets the result in a separate turn."""
        self._take_in(event)
        self._timeline.after(0.0, partial(self._pump, self.life))

    def _send(self, peer: bytes, message: ToReplica) -> None:
        connection = self.connections.get(peer)
        if connection is None or not connection.to_replica(message):
            self._take_in(PeerUnreachable(peer=peer))

    def _pump(self, life: int) -> None:
        """Carry out the core's actions."""
        if not self.up or self.life != life:
            return
        while self._actions:
            actions, self._actions = self._actions, []
            for action in actions:
                if isinstance(action, SendMessage):
                    self._send(action.peer, action.message)
                elif isinstance(action, DeliverTokens):
                    for id, choice, first, tokens, logprobs in action.deliveries:
                        call = self._expecting(id, choice)
                        call.caller.on_tokens(call, choice, first, tokens, logprobs)
                elif not isinstance(action, DeliverPromptLogprobs | DeliverCachedTokens):
                    self._end(action)
        self._turns += 1
        if self._turns % CHECK_TURNS == 0:
            self.core.check()

    def _expecting(self, id: int, choice: int) -> SimCall:
        """The call that something is delivered for. Callers only act between two turns, so nothing may come for one that is over."""
        call = self.calls.get(id)
        assert call is not None, f"router{self.index}: something came for call {id} after its end"
        assert choice not in call.over, f"router{self.index}: something came for choice {choice} of {call.request.request_id} after its end"
        return call

    def _end(self, action: FinishChoice | FailChoice) -> None:
        call = self._expecting(action.owner, action.choice)
        call.over.add(action.choice)
        if len(call.over) == call.request.n:
            del self.calls[call.id]
        if isinstance(action, FinishChoice):
            call.caller.on_finished(call, action.choice, action.reason, action.usage)
        else:
            call.caller.on_errored(call, action.choice, action.error)

    # --- its end

    def crash(self) -> None:
        """SIGKILL: connections break, clients see a reset or nothing at all."""
        if not self.up:
            return
        self.up = False
        if self._recorder is not None:
            self.dumps.append(self._recorder.dump(0.0))
        for name, count in self.core.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for connection in list(self.connections.values()):
            connection.sever()
        calls, self.calls = list(self.calls.values()), {}
        for call in calls:
            call.caller.on_lost(call)

    def close(self, grace_s: float) -> None:
        """SIGTERM."""
        if self.up:
            self._take_in(StopAccepting())
            self._timeline.after(grace_s, partial(self._stop, self.life))

    def _stop(self, life: int) -> None:
        if self.up and self.life == life:
            self._take_in(AbortAll())
            self._pump(life)
            self.crash()

    # --- proof

    def check_idle(self) -> None:
        self.core.check()
        assert not self.core.live and not self.calls, f"router{self.index} holds {self.core.live} requests, {len(self.calls)} calls"
        assert not any(replica.streams for replica in self.core.registry.replicas.values()), f"router{self.index}: a stream is left"
