"""A router's record of one request, and what the routing core asks its shell to do.

The record is what makes a dead replica a pause and not a loss: prompt ids, emitted ids, parameters with the resolved seed, attempt. Only
:mod:`orchestrator.router.core.router_core` and :mod:`orchestrator.router.core.transitions` write it.

    queued --Submit--> sent --Accepted--> accepted --Tokens--> running --Done | Failed | finish | cancel | deadline--> ended
    sent --Tokens--> running
    sent, accepted, running --replica lost, bounced, no Accepted in time--> queued (at the front, attempt + 1)
    accepted, running --connection moved, gap--> sent (by Attach, same attempt)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, TypeAlias

import msgspec

from orchestrator.router.core.replica_registry import Replica
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.stats import Attempt
from workers.protocol.errors import TriremeError
from workers.protocol.messages import UNLIMITED, FinishReason, Logprobs, SamplingParams, ToReplica, Usage

Phase = Literal["queued", "sent", "accepted", "running", "ended"]

#: A door's own attempt (a client that continues here after another router died) outranks every placement under the former one.
ATTEMPTS_PER_ASK = 1024


class ChoiceState:
    """One choice of a request. ``emitted`` includes what the client held at the start (``base`` tokens); ``granted`` counts beyond it.

    ``emitted`` is the ask's own list where it has one: its door reads the record there, and a token is written once.
    """

    __slots__ = (
        "attempt", "attempts", "base", "choice", "deaths", "emitted", "granted", "held", "id", "owner", "params", "phase", "queued_at",
        "replica", "request", "scored", "sent_at", "short", "starved", "stream", "trail",
    )  # fmt: skip

    def __init__(self, request: RequestState, id: int, choice: int, params: SamplingParams, emitted: list[int]) -> None:
        self.request, self.id, self.choice, self.params, self.emitted = request, id, choice, params, emitted
        self.owner = request.owner
        self.base = len(emitted)
        self.granted = request.ask.credit
        self.phase: Phase = "queued"
        self.replica: Replica | None = None
        self.stream = 0
        #: Attempt of the current placement, and how many placements there were.
        self.attempt = self.attempts = 0
        #: Replicas lost in a row while this row was there and did not get on; ``held``: its tokens when it was last placed.
        self.deaths = self.held = 0
        self.queued_at, self.sent_at = request.arrived, 0.0
        #: A Done came before its tokens once.
        self.short = False
        #: Prompt logprobs went out.
        self.scored = False
        #: It is at a replica and its client takes nothing now.
        self.starved = False
        #: Its placements in order; the ask's own list where it has one, so that a door which wants to know reads it there.
        self.trail: list[Attempt] = request.ask.trails[choice] if choice < len(request.ask.trails) else []

    @property
    def credit(self) -> int:
        """Tokens that the client will still take."""
        return UNLIMITED if self.granted >= UNLIMITED else self.granted - (len(self.emitted) - self.base)

    @property
    def known(self) -> int:
        """Tokens that a replica must hold before it decodes the next."""
        return len(self.request.ask.prompt_ids) + len(self.emitted)


class RequestState:
    """A live request. ``owner`` comes back in every delivery; here nobody looks into it. ``deadline`` is absolute, inf = none."""

    __slots__ = ("arrived", "ask", "chains", "deadline", "id", "live", "model", "owner", "rows")

    def __init__(self, id: int, owner: Any, ask: RouterRequest, model: str, now: float, deadline: float) -> None:
        self.id, self.owner, self.ask, self.model, self.arrived, self.deadline = id, owner, ask, model, now, deadline
        self.rows: list[ChoiceState] = []
        #: Rows not ended.
        self.live = 0
        #: Prefix hashes of the prompt by block size, computed when first needed.
        self.chains: dict[int, list[int]] = {}


class WaitingQueue:
    """One model's queue. Rows that lost their place go before new ones, each group in its own order."""

    __slots__ = ("_fresh", "_returned")

    def __init__(self) -> None:
        self._returned: OrderedDict[int, ChoiceState] = OrderedDict()
        self._fresh: OrderedDict[int, ChoiceState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._returned) + len(self._fresh)

    def __contains__(self, row: ChoiceState) -> bool:
        return row.id in self._fresh or row.id in self._returned

    def push(self, row: ChoiceState) -> None:
        self._fresh[row.id] = row

    def push_front(self, row: ChoiceState) -> None:
        self._returned[row.id] = row

    def first(self) -> ChoiceState | None:
        for rows in (self._returned, self._fresh):
            for row in rows.values():
                return row
        return None

    def remove(self, row: ChoiceState) -> None:
        if self._fresh.pop(row.id, None) is None:
            del self._returned[row.id]

    def since(self, moment: float) -> list[ChoiceState]:
        """Rows that wait since ``moment`` or before; each group is in the order of its times, so the others are not looked at."""
        found: list[ChoiceState] = []
        for rows in (self._returned, self._fresh):
            for row in rows.values():
                if row.queued_at > moment:
                    break
                found.append(row)
        return found


class SendMessage(msgspec.Struct, frozen=True, gc=False):
    """Give ``message`` to the connection ``peer``; if it cannot be taken, tell the core by ``unreachable``."""

    peer: bytes
    message: ToReplica


#: (owner, choice, first, tokens, logprobs): tokens for a choice, in order, without gap or repeat: ``first`` continues the last delivery.
Delivery: TypeAlias = tuple[Any, int, int, list[int], list[Logprobs] | None]


class DeliverTokens(msgspec.Struct, frozen=True, gc=False):
    """All that one message of a replica brought: one action a step, and a tuple a row, since this is what a token pays for."""

    rows: list[Delivery]


class DeliverPromptLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Prompt logprobs of a choice, once."""

    owner: Any
    choice: int
    logprobs: list[Logprobs]


class FinishChoice(msgspec.Struct, frozen=True, gc=False):
    """A choice's terminal: done."""

    owner: Any
    choice: int
    reason: FinishReason
    usage: Usage
    stop_id: int | None


class FailChoice(msgspec.Struct, frozen=True, gc=False):
    """A choice's terminal: failed."""

    owner: Any
    choice: int
    error: TriremeError


Action: TypeAlias = SendMessage | DeliverTokens | DeliverPromptLogprobs | FinishChoice | FailChoice
