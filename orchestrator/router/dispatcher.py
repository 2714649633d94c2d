"""The shell of the routing core: passes events with the time to it, and carries out its actions.

Owns the watchers of live requests and the credit that frontends granted since the last turn of the event loop. Implements
:class:`orchestrator.router.interfaces.Dispatcher`. Decides nothing itself, never awaits, and an error in one request's watcher never
reaches another's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter

from orchestrator.router import request_context
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
from orchestrator.router.core.history import RequestStory
from orchestrator.router.core.recorder import DumpPart, EventRecorder, user_digest
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.core.session_table import session_key
from orchestrator.router.interfaces import Watcher
from orchestrator.router.key_limits import KeyLimiter
from orchestrator.router.metrics import RequestMeter
from orchestrator.router.status import model_status, router_status
from workers.protocol.errors import EngineFault, ReplicaLost, printable
from workers.protocol.messages import FromReplica, Heartbeat, ToReplica, error_text
from workers.protocol.status import ModelStatus, RouterStatus

log = logging.getLogger("trireme.dispatch")

#: Sends a message on a replica's connection; False = not possible.
SendToReplica = Callable[[bytes, ToReplica], bool]


class RequestTicket:
    """The :class:`~orchestrator.router.interfaces.Ticket`. ``open``: a bit for each choice for which the watcher still expects something
    (a set would be two more objects to touch for every token)."""

    __slots__ = ("_dispatcher", "context", "id", "last", "meter", "open", "watcher")

    def __init__(self, dispatcher: RouterDispatcher, id: int, choices: int, watcher: Watcher, meter: RequestMeter) -> None:
        self._dispatcher, self.id, self.watcher, self.meter = dispatcher, id, watcher, meter
        #: The request context, for log lines: later events of the request run in other tasks.
        self.context = request_context.current()
        #: When its last tokens were delivered; None = none were.
        self.last: float | None = None
        self.open = (1 << choices) - 1

    def cancel(self) -> None:
        if not self.open:
            return  # every frontend cancels at the end, but the core needs to know only about running choices
        self.open = 0
        self._dispatcher.handle(CancelRequest(id=self.id))

    def stop_choice(self, choice: int) -> None:
        self.close(choice)
        self._dispatcher.handle(StopChoice(id=self.id, choice=choice))

    def close(self, choice: int) -> None:
        """Nothing more is expected for ``choice``."""
        self.open &= ~(1 << choice)

    def credit(self, tokens: int) -> None:
        self._dispatcher.credit(self.id, tokens)


class RouterDispatcher:
    """One router's dispatcher. ``send`` belongs to the replica link; ``clock`` is monotonic seconds. ``limiter`` hears what leaders say of
    API keys."""

    def __init__(
        self, core: RouterCore, *, name: str, send: SendToReplica, clock: Callable[[], float], limiter: KeyLimiter | None = None
    ) -> None:  # fmt: skip
        self._limiter = limiter
        self._core, self._name, self._send, self._clock = core, name, send, clock
        self._recorder = EventRecorder(core, id_of=attrgetter("id"), digest=partial(user_digest, key=secrets.token_bytes(16)))
        self._actions: list[Action] = []
        #: Credit by request: it reaches the core once per turn of the event loop, so that a replica gets one message.
        self._credit: dict[int, int] = {}
        self._pumping = self._pump_due = False
        #: The time of the last event, whose output is delivered in the same turn.
        self._handled_at = 0.0
        self._requests = 0
        #: Number of logged losses of replicas.
        self._logged = 0

    # --- the frontends' side

    def submit(self, request: RouterRequest, watcher: Watcher, meter: RequestMeter) -> RequestTicket:
        """Raises NotFound, Overloaded, Unavailable, DeadlineExceeded. The watcher is called from the loop's next turn on."""
        self._requests += 1
        ticket = RequestTicket(self, self._requests, request.n, watcher, meter)
        self.handle(SubmitRequest(id=ticket.id, request=request, session=session_key(request), owner=ticket))
        return ticket

    def credit(self, id: int, tokens: int) -> None:
        """Grant ``tokens`` more to every live choice of request ``id``."""
        self._credit[id] = self._credit.get(id, 0) + tokens
        self._pump_soon()

    def model(self, name: str) -> ModelStatus | None:
        return model_status(self._core, name)

    def ready(self) -> bool:
        core = self._core
        return all(any(replica.state == "ready" for replica in core.registry.serving(model)) for model in core.models)

    def status(self) -> RouterStatus:
        return router_status(self._core, self._name, self._clock())

    def stories(self, request_id: str) -> list[RequestStory]:
        """What happened to the requests with this id, as far as it is kept."""
        return self._core.stories(request_id)

    def dump(self) -> list[DumpPart]:
        """The last events, with the state before and after them: :meth:`EventRecorder.dump`."""
        return self._recorder.dump(self.unix_offset_s)

    @property
    def now(self) -> float:
        """The core's time, seconds."""
        return self._clock()

    @property
    def unix_offset_s(self) -> float:
        """Offset from the core's time to seconds since 1970."""
        return time.time() - self._clock()

    # --- the replicas' side

    def hear(self, peer: bytes, user: str, message: FromReplica, frame: bytes) -> None:
        self._take_in(ReplicaMessage(peer=peer, user=user, message=message, frame=frame))
        if isinstance(message, Heartbeat) and message.keys is not None and self._limiter is not None:
            replica = self._core.registry.at(peer)
            if replica is not None and replica.boot == message.boot and replica.user == user and not replica.quarantined:
                self._limiter.hear(message.boot, message.keys, time.monotonic())
        self.pump()

    def unreachable(self, peer: bytes) -> None:
        self.handle(PeerUnreachable(peer=peer))

    def peers(self) -> list[bytes]:
        """Connections of replicas that are not lost."""
        return [replica.peer for replica in self._core.registry.replicas.values() if replica.state != "lost"]

    # --- the process's side

    def tick(self) -> None:
        self._take_in(Tick())
        self._log_losses()
        self.pump()
        if not self._core.live:
            self._core.check()

    def _log_losses(self) -> None:
        registry = self._core.registry
        new, self._logged = registry.losses_total - self._logged, registry.losses_total
        for loss in list(registry.losses)[-new:] if new else ():
            level = logging.INFO if loss.drained else logging.WARNING
            text = "replica %s is lost: %s; %d choices"
            log.log(level, text, ascii(loss.replica), loss.reason, loss.choices, extra={"replica": loss.replica})

    def stop_accepting(self) -> None:
        """Accept nothing new."""
        self._take_in(StopAccepting())

    def abort(self) -> None:
        """Fail the remaining requests and send Bye to the replicas."""
        self._take_in(AbortAll())
        self.pump()

    @property
    def live(self) -> int:
        return self._core.live

    # --- events in, actions out

    def handle(self, event: RouterEvent) -> None:
        """Pass an event to the core; its actions are carried out in the loop's next turn, or in the running turn of :meth:`pump`."""
        self._take_in(event)
        self._pump_soon()

    def _take_in(self, event: RouterEvent) -> None:
        self._handled_at = now = self._clock()
        self._actions += self._recorder.handle(event, now)

    def _pump_soon(self) -> None:
        if not self._pump_due and not self._pumping:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        """Carry out the core's actions; watchers may call back into this object, which only queues more actions."""
        if self._pumping:
            return
        self._pumping, self._pump_due = True, False
        try:
            while self._actions or self._credit:
                if self._credit:
                    credit, self._credit = self._credit, {}
                    self._take_in(AddCredit(ids=list(credit), tokens=list(credit.values())))
                actions, self._actions = self._actions, []
                for action in actions:
                    if isinstance(action, DeliverTokens):
                        self._deliver(action)
                    else:
                        self._act(action)
        finally:
            self._pumping = False

    def _deliver(self, action: DeliverTokens) -> None:
        now = self._handled_at
        # Choices that come together mostly came together the last time too, so one call of the meter counts a run of choices with equal
        # intervals and sizes. Tickets of one delivery share the very object ``now`` as their ``last``, so ``is`` finds the equal ones.
        # A first token has no interval: it ends the run, and the -1.0 object, which is no ticket's ``last``, lets the next one begin again.
        meter: RequestMeter | None = None
        since, size, choices = -1.0, 0, 0
        for ticket, choice, first, tokens, logprobs in action.deliveries:
            if not ticket.open >> choice & 1:
                continue
            last = ticket.last
            if last is not since or len(tokens) != size:
                if meter is not None:
                    meter.tokens(choices, size, now - since)
                size, choices = len(tokens), 0
                if last is None:
                    ticket.meter.first(size, now)
                    meter, since = None, -1.0
                else:
                    meter, since = ticket.meter, last
            choices += 1
            ticket.last = now
            try:
                ticket.watcher.on_tokens(choice, first, tokens, logprobs)
            except Exception as error:
                # The edge of a request: an error in its frontend ends only this request.
                self._break(ticket, error)
        if meter is not None:
            meter.tokens(choices, size, now - since)

    def _act(self, action: SendMessage | DeliverPromptLogprobs | DeliverCachedTokens | FinishChoice | FailChoice) -> None:
        if isinstance(action, SendMessage):
            if not self._send(action.peer, action.message):
                self._take_in(PeerUnreachable(peer=action.peer))
            return
        ticket: RequestTicket = action.owner
        if not ticket.open >> action.choice & 1:
            return
        try:
            self._notify(ticket, action)
        except Exception as error:
            # As above.
            self._break(ticket, error)

    def _notify(self, ticket: RequestTicket, action: DeliverPromptLogprobs | DeliverCachedTokens | FinishChoice | FailChoice) -> None:
        watcher = ticket.watcher
        if isinstance(action, DeliverPromptLogprobs):
            watcher.on_prompt(action.choice, action.logprobs)
            return
        if isinstance(action, DeliverCachedTokens):
            watcher.on_cached(action.choice, action.cached_tokens)
            return
        ticket.close(action.choice)
        if isinstance(action, FinishChoice):
            watcher.on_done(action.choice, action.reason, action.usage, action.stop_id)
        else:
            if isinstance(action.error, EngineFault | ReplicaLost):
                log.warning(
                    "a request failed: %s: %s",
                    action.error.code,
                    printable(error_text(action.error)),
                    extra=request_context.fields(ticket.context),
                )
            watcher.on_failed(action.choice, action.error)

    def _break(self, ticket: RequestTicket, error: Exception) -> None:
        log.error("request %d: its frontend failed", ticket.id, exc_info=error, extra=request_context.fields(ticket.context))
        choices = [choice for choice in range(ticket.open.bit_length()) if ticket.open >> choice & 1]
        ticket.cancel()
        for choice in choices:
            try:
                ticket.watcher.on_failed(
                    choice, EngineFault("the router failed on this request", type(error).__name__, code="internal_error")
                )
            except Exception:
                log.exception("request %d: its frontend failed again", ticket.id, extra=request_context.fields(ticket.context))
                return
