"""The state of one live request and of each of its choices, with their snapshots.

Owns no transition: :class:`orchestrator.router.core.request_table.RequestTable` alone changes these objects, except that
:meth:`ChoiceState.restored` fills a new one.
"""

from __future__ import annotations

from math import inf
from typing import Any, Literal

import msgspec

from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.fair_order import TenantAccount
from orchestrator.router.core.history import ChoiceStory, RequestStory
from orchestrator.router.core.replica_registry import Replica, ReplicaRegistry
from orchestrator.router.core.stats import Attempt
from workers.protocol.messages import UNLIMITED, SamplingParams
from workers.scheduler.block_pool import prefix_hashes

Phase = Literal["queued", "sent", "accepted", "running", "ended"]
End = Literal["finished", "failed", "cancelled"]


class ChoiceSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The whole state of a :class:`ChoiceState`; of the tokens only their number, of the attempts only those that the core still reads: the
    first and the last two. ``replica``: its name, empty in the queue."""

    id: int
    phase: Phase
    emitted: int
    resumed_from: int
    granted: int
    queued_at: float
    sent_at: float
    answer_by: float
    seen: int
    seen_at: float
    attempts: list[Attempt]
    replica: str = ""
    stream: int = 0
    attempt_number: int = 0
    sends: int = 0
    deaths: int = 0
    emitted_at_send: int = 0
    ended_short: bool = False
    prompt_logprobs_sent: bool = False
    paused: bool = False
    cached_tokens: int = 0
    gap: int = -1
    questioned: bool = False


class RequestSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The whole state of a :class:`RequestState`; of the client's data only counts. ``deadline`` None = none."""

    id: int
    request_id: str
    model: str
    arrived: float
    prompt_tokens: int
    max_tokens: int
    choices: list[ChoiceSnapshot]
    deadline: float | None = None
    session: str = ""
    client_attempt: int = 0
    tenant: str = ""
    priority: int = 0


class ChoiceState:
    """One choice of a request. ``index``: which one of n. ``emitted`` includes the ``resumed_from`` tokens that the client had at the
    start; ``granted``: further tokens that the client accepts.

    ``emitted`` and ``attempts`` are the request's own lists where it has them: its frontend reads them there, and a token is stored once.
    """

    __slots__ = (
        "account", "answer_by", "attempt_number", "attempts", "cached_tokens", "deaths", "emitted", "emitted_at_send", "end", "end_detail",
        "ended_at", "ended_short", "gap", "granted", "id", "index", "limit", "owner", "params", "paused", "phase", "prompt_logprobs_sent",
        "questioned", "queued_at", "replica", "request", "resumed_from", "seen", "seen_at", "sends", "sent_at", "stream", "watch_at",
    )  # fmt: skip

    def __init__(self, request: RequestState, id: int, index: int, params: SamplingParams, emitted: list[int]) -> None:
        spec = request.spec
        self.request, self.id, self.index, self.params, self.emitted = request, id, index, params, emitted
        self.owner, self.limit, self.account = request.owner, params.max_tokens, request.account
        self.resumed_from = len(emitted)
        self.granted = spec.credit
        #: From this number of tokens on, its credit has ended or it has more than its limit: below it, one comparison accepts a token.
        self.watch_at = self.bound
        self.phase: Phase = "queued"
        self.replica: Replica | None = None
        self.stream = 0
        #: The number of the present attempt, over all routers, and how often this router has sent the choice.
        self.attempt_number = self.sends = 0
        #: Replicas lost one after the other while this choice ran there without progress; number of its tokens at the last send.
        self.deaths = self.emitted_at_send = 0
        #: When it entered the queue, when the last Submit or Attach went out, and until when that must be acknowledged.
        self.queued_at, self.sent_at, self.answer_by = request.arrived, 0.0, 0.0
        #: Its tokens at the last progress check with progress, the time of that check, and whether Attach was sent since.
        self.seen, self.seen_at, self.questioned = 0, 0.0, False
        #: The number of its tokens at the last Attach for missing tokens; -1 = none in this attempt.
        self.gap = -1
        #: A Done arrived before its tokens once.
        self.ended_short = False
        self.prompt_logprobs_sent = False
        #: Prompt tokens that the replica of its present attempt found in the prefix cache, if it has reported them.
        self.cached_tokens = 0
        #: It is at a replica and has no credit.
        self.paused = False
        self.attempts: list[Attempt] = spec.attempts[index] if index < len(spec.attempts) else []
        #: How, why and when it ended.
        self.end: End | Literal[""] = ""
        self.end_detail = ""
        self.ended_at = 0.0

    @property
    def credit(self) -> int:
        """Tokens that the client will still take."""
        return UNLIMITED if self.granted >= UNLIMITED else self.granted - (len(self.emitted) - self.resumed_from)

    @property
    def bound(self) -> int:
        """The value of ``watch_at`` for the present credit."""
        return min(self.limit + 1, self.resumed_from + self.granted)

    @property
    def known(self) -> int:
        """Tokens that a replica must have computed before it decodes the next."""
        return len(self.request.spec.prompt_ids) + len(self.emitted)

    @property
    def name(self) -> str:
        """The permanent name at leaders: unambiguous, because the part after the last slash is always the index."""
        return f"{self.request.spec.request_id}/{self.index}"

    def story(self) -> ChoiceStory:
        return ChoiceStory(
            phase=self.phase, output_tokens=len(self.emitted), attempts=list(self.attempts),
            dropped_attempts=self.sends - len(self.attempts), end=self.end, detail=self.end_detail, ended_at=self.ended_at,
        )  # fmt: skip

    def snapshot(self) -> ChoiceSnapshot:
        attempts = self.attempts
        return ChoiceSnapshot(
            id=self.id, phase=self.phase, emitted=len(self.emitted), resumed_from=self.resumed_from, granted=self.granted,
            queued_at=self.queued_at, sent_at=self.sent_at, answer_by=self.answer_by, seen=self.seen, seen_at=self.seen_at,
            attempts=attempts if len(attempts) <= 3 else [attempts[0], *attempts[-2:]],
            replica=self.replica.name if self.replica is not None else "",
            stream=self.stream, attempt_number=self.attempt_number, sends=self.sends, deaths=self.deaths,
            emitted_at_send=self.emitted_at_send, ended_short=self.ended_short, prompt_logprobs_sent=self.prompt_logprobs_sent,
            paused=self.paused, cached_tokens=self.cached_tokens, gap=self.gap, questioned=self.questioned,
        )  # fmt: skip

    @classmethod
    def restored(cls, request: RequestState, index: int, found: ChoiceSnapshot, registry: ReplicaRegistry) -> ChoiceState:
        """The choice that ``found`` was taken of; its tokens have their number alone."""
        choice = cls(request, found.id, index, request.spec.params, [0] * found.emitted)
        choice.phase, choice.resumed_from, choice.granted = found.phase, found.resumed_from, found.granted
        choice.replica = registry.replicas[found.replica] if found.replica else None
        choice.stream, choice.attempt_number, choice.sends, choice.paused = found.stream, found.attempt_number, found.sends, found.paused
        choice.deaths, choice.emitted_at_send, choice.ended_short = found.deaths, found.emitted_at_send, found.ended_short
        choice.queued_at, choice.sent_at, choice.answer_by = found.queued_at, found.sent_at, found.answer_by
        choice.seen, choice.seen_at, choice.questioned, choice.gap = found.seen, found.seen_at, found.questioned, found.gap
        choice.watch_at = choice.bound
        choice.prompt_logprobs_sent, choice.attempts = found.prompt_logprobs_sent, list(found.attempts)
        choice.cached_tokens = found.cached_tokens
        return choice


class RequestState:
    """A live request. ``owner`` comes back in every delivery; the core never looks into it. ``deadline`` is absolute, inf = none. ``live``:
    choices that have not ended. ``account``: its tenant's, in the order of the model's queue."""

    __slots__ = ("_prompt_hashes", "account", "arrived", "choices", "deadline", "id", "live", "owner", "session", "spec")

    def __init__(self, submitted: SubmitRequest, account: TenantAccount, now: float, deadline: float) -> None:
        self.id, self.spec, self.session = submitted.id, submitted.request, submitted.session
        self.owner: Any = submitted.id if submitted.owner is None else submitted.owner
        self.account, self.arrived, self.deadline = account, now, deadline
        self.choices: list[ChoiceState] = []
        self.live = 0
        self._prompt_hashes: dict[int, list[int]] = {}

    def prompt_hashes(self, block_size: int) -> list[int]:
        """Prefix hashes of the prompt, computed once for each block size."""
        hashes = self._prompt_hashes.get(block_size)
        if hashes is None:
            hashes = self._prompt_hashes[block_size] = prefix_hashes(self.spec.prompt_ids, block_size, self.spec.salt)
        return hashes

    def story(self) -> RequestStory:
        spec = self.spec
        return RequestStory(
            request_id=spec.request_id, number=self.id, model=spec.model, arrived_at=self.arrived, prompt_tokens=len(spec.prompt_ids),
            max_tokens=spec.params.max_tokens, choices=[choice.story() for choice in self.choices], caller_id=self.caller_id,
            client_attempt=spec.client_attempt,
        )  # fmt: skip

    @property
    def caller_id(self) -> str:
        """The caller's request id in log lines, if it differs from the request's own."""
        caller_id = self.spec.marks[0]
        return caller_id if caller_id != self.spec.request_id else ""

    def snapshot(self) -> RequestSnapshot:
        spec = self.spec
        return RequestSnapshot(
            id=self.id, request_id=spec.request_id, model=spec.model, arrived=self.arrived, prompt_tokens=len(spec.prompt_ids),
            max_tokens=spec.params.max_tokens, choices=[choice.snapshot() for choice in self.choices],
            deadline=self.deadline if self.deadline < inf else None, session=self.session, client_attempt=spec.client_attempt,
            tenant=spec.tenant, priority=spec.priority,
        )  # fmt: skip
