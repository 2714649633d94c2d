"""The shell of the routing core: gives it events with the time, and does what it asks.

Owns the watchers of live requests. Implements :class:`orchestrator.router.interfaces.Dispatcher`. Decides nothing itself, never awaits, and
an error in one request's watcher never reaches another's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from orchestrator.router import request_context
from orchestrator.router.core.replica_registry import ReplicaLoss
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.request_state import DeliverPromptLogprobs, DeliverTokens, FailChoice, FinishChoice, SendMessage
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.interfaces import Watcher
from orchestrator.router.metrics import RequestMeter
from orchestrator.router.status import model_status, router_status
from workers.protocol.errors import EngineFault, ReplicaLost, printable
from workers.protocol.messages import FromReplica, ToReplica
from workers.protocol.status import ModelStatus, RouterStatus

log = logging.getLogger("trireme.dispatch")

#: Gives a message to a replica's connection; False = it cannot be taken.
SendToReplica = Callable[[bytes, ToReplica], bool]


class RequestTicket:
    """The :class:`~orchestrator.router.interfaces.Ticket`. ``open``: bit i = the watcher still expects something for choice i."""

    __slots__ = ("_dispatch", "id", "last", "meter", "open", "origin", "watcher")

    def __init__(self, dispatch: RouterDispatcher, choices: int, watcher: Watcher, meter: RequestMeter) -> None:
        self._dispatch, self.watcher, self.meter = dispatch, watcher, meter
        self.id = 0
        #: Whose it is, for log lines: what befalls it later befalls it in other tasks.
        self.origin = request_context.current()
        #: When its last tokens were delivered; None = none were.
        self.last: float | None = None
        self.open = (1 << choices) - 1

    def cancel(self) -> None:
        self.open = 0
        self._dispatch.cancel(self)

    def finish(self, choice: int) -> None:
        self.open &= ~(1 << choice)
        self._dispatch.finish(self, choice)

    def credit(self, tokens: int) -> None:
        self._dispatch.credit(self, tokens)


class RouterDispatcher:
    """One router's dispatcher. ``send`` belongs to the replica link; ``clock`` is monotonic seconds."""

    def __init__(self, route: RouterCore, *, name: str, send: SendToReplica, clock: Callable[[], float]) -> None:
        self._route, self._name, self._send, self._clock = route, name, send, clock
        self._pumping = self._armed = False
        self._told: ReplicaLoss | None = None

    # --- the doors' side

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> RequestTicket:
        """Raises NotFound, Overloaded, Unavailable, DeadlineExceeded. The watcher hears nothing before the loop's next turn."""
        flight = RequestTicket(self, ask.n, watcher, meter)
        flight.id = self._route.submit(ask, self._clock(), flight)
        self._arm()
        return flight

    def cancel(self, flight: RequestTicket) -> None:
        self._route.cancel(flight.id, self._clock())
        self._arm()

    def finish(self, flight: RequestTicket, choice: int) -> None:
        self._route.finish(flight.id, choice, self._clock())
        self._arm()

    def credit(self, flight: RequestTicket, tokens: int) -> None:
        self._route.credit(flight.id, tokens)
        self._arm()

    def model(self, name: str) -> ModelStatus | None:
        return model_status(self._route, name)

    def ready(self) -> bool:
        fleet = self._route.fleet
        return all(any(replica.state == "ready" for replica in fleet.serving(model)) for model in self._route.models)

    def status(self) -> RouterStatus:
        return router_status(self._route, self._name, self._clock())

    # --- the replicas' side

    def hear(self, peer: bytes, user: str, message: FromReplica) -> None:
        self._route.hear(peer, user, message, self._clock())
        self.pump()

    def tick(self) -> None:
        self._route.tick(self._clock())
        self._tell_losses()
        self.pump()
        if not self._route.live:
            self._route.check()

    def _tell_losses(self) -> None:
        losses = self._route.fleet.losses
        if not losses or losses[-1] is self._told:
            return
        fresh = list(losses)
        for loss in fresh[fresh.index(self._told) + 1 if self._told in fresh else 0 :]:
            level = logging.INFO if loss.drained else logging.WARNING
            log.log(level, "replica %s is lost: %s; %d rows", ascii(loss.replica), loss.reason, loss.rows, extra={"replica": loss.replica})
        self._told = fresh[-1]

    def close(self) -> None:
        """Accept nothing new."""
        self._route.close()

    def abort(self) -> None:
        """Fail what is left and tell the replicas."""
        self._route.abort(self._clock())
        self.pump()

    @property
    def live(self) -> int:
        return self._route.live

    def peers(self) -> list[bytes]:
        """Connections of replicas that are not lost."""
        return [replica.peer for replica in self._route.fleet.replicas.values() if replica.state != "lost"]

    def unreachable(self, peer: bytes) -> None:
        self._route.unreachable(peer, self._clock())
        self._arm()

    def pump(self) -> None:
        """Do everything that the core asks; watchers may call back into this object, which only adds to what is to be done."""
        if self._pumping:
            return
        self._pumping, self._armed = True, False
        try:
            while actions := self._route.take():
                for action in actions:
                    if isinstance(action, DeliverTokens):
                        self._deliver(action)
                    else:
                        self._act(action)
        finally:
            self._pumping = False

    def _arm(self) -> None:
        if not self._armed and not self._pumping:
            self._armed = True
            asyncio.get_running_loop().call_soon(self.pump)

    def _deliver(self, action: DeliverTokens) -> None:
        now = self._clock()
        # Rows that come together mostly came together the last time too: one entry for as many as have the same interval.
        meter: RequestMeter | None = None
        since, size, rows = -1.0, 0, 0
        for flight, choice, first, tokens, logprobs in action.rows:
            if not flight.open >> choice & 1:
                continue
            last = flight.last
            if last is not since or len(tokens) != size:
                if meter is not None:
                    meter.tokens(rows, size, now - since)
                size, rows = len(tokens), 0
                if last is None:
                    flight.meter.first(size, now)
                    meter, since = None, -1.0
                else:
                    meter, since = flight.meter, last
            rows += 1
            flight.last = now
            try:
                flight.watcher.on_tokens(choice, first, tokens, logprobs)
            except Exception as error:
                # The edge of a request: whatever its door did wrong ends this request only.
                self._break(flight, error)
        if meter is not None:
            meter.tokens(rows, size, now - since)

    def _act(self, action: SendMessage | DeliverPromptLogprobs | FinishChoice | FailChoice) -> None:
        if isinstance(action, SendMessage):
            if action.peer and not self._send(action.peer, action.message):
                self._route.unreachable(action.peer, self._clock())
            return
        flight: RequestTicket = action.owner
        if not flight.open >> action.choice & 1:
            return
        try:
            self._tell(flight, action)
        except Exception as error:
            # As above.
            self._break(flight, error)

    def _tell(self, flight: RequestTicket, action: DeliverPromptLogprobs | FinishChoice | FailChoice) -> None:
        watcher = flight.watcher
        if isinstance(action, DeliverPromptLogprobs):
            watcher.on_prompt(action.choice, action.logprobs)
            return
        flight.open &= ~(1 << action.choice)
        if isinstance(action, FinishChoice):
            watcher.on_done(action.choice, action.reason, action.usage, action.stop_id)
        else:
            if isinstance(action.error, EngineFault | ReplicaLost):
                log.warning(
                    "a request failed: %s: %s", action.error.code, printable(str(action.error)), extra=request_context.fields(flight.origin)
                )
            watcher.on_failed(action.choice, action.error)

    def _break(self, flight: RequestTicket, error: Exception) -> None:
        log.error("request %d: its door failed", flight.id, exc_info=error, extra=request_context.fields(flight.origin))
        choices = [choice for choice in range(flight.open.bit_length()) if flight.open >> choice & 1]
        flight.cancel()
        for choice in choices:
            try:
                flight.watcher.on_failed(
                    choice, EngineFault("the router failed on this request", type(error).__name__, code="internal_error")
                )
            except Exception:
                log.exception("request %d: its door failed again", flight.id, extra=request_context.fields(flight.origin))
                return
