"""The request table of one router: the state machine of every live choice, from its admission to its one terminal message.

Owns every request and choice, the waiting queues, the streams at replicas, the totals, and the actions of its transitions. It alone writes
a :class:`ChoiceState` or a :class:`RequestState`. It decides nothing: :mod:`orchestrator.router.core.router_core` evaluates events and
calls the transitions below. The record of a choice (prompt, emitted tokens, parameters with the resolved seed, attempt) is the reason why
the death of a replica is a pause and not a loss.

    state      means                            left by             on                                            to
    (new)      not admitted yet                 admit               SubmitRequest                                 queued
    queued     waits in its model's queue       send                a replica has a place                         sent
    sent       Submit or Attach is on its way   on_accepted         Accepted                                      accepted
                                                on_tokens           Tokens                                        running
    accepted   waits for its first token        on_tokens           Tokens                                        running
    running    tokens come                      reattach            a gap in its tokens                           sent
    sent, accepted, running                     reattach            its connection was replaced | no progress     sent
                                                requeue             replica lost | refused | no answer | short |  queued
                                                                    invalid | stalled
    any but ended                               finish              Done; all tokens are here already             ended
                                                fail                Failed | deadline | queue timeout | abort     ended
                                                cancel, stop_choice CancelRequest, StopChoice                     ended

``reattach`` keeps the attempt and takes a new stream; ``requeue`` puts the choice before all new ones, and its next ``send`` is a new
attempt. A live choice is either in its model's queue or on one stream at one replica, never both and never neither:
:meth:`RequestTable.check` asserts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, count
from math import inf

import msgspec

from orchestrator.router.core.actions import (
    Action,
    DeliverCachedTokens,
    DeliverPromptLogprobs,
    DeliverTokens,
    Delivery,
    FailChoice,
    FinishChoice,
    SendMessage,
)
from orchestrator.router.core.choice_state import ChoiceState, End, RequestSnapshot, RequestState
from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.fair_order import FairOrderSnapshot, TenantAccount
from orchestrator.router.core.history import RequestHistory, RequestStory
from orchestrator.router.core.replica_registry import Replica, ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.stats import Attempt, Cause, ModelStats, PlacementReason
from orchestrator.router.core.waiting_queue import WaitingQueue
from workers.protocol.errors import DeadlineExceeded, TriremeError
from workers.protocol.messages import (
    UNLIMITED,
    Attach,
    Cancel,
    Credit,
    FinishReason,
    GenerateTask,
    Logprobs,
    SamplingParams,
    Submit,
    Tokens,
    ToReplica,
    Usage,
)
from workers.sampling.definition import choice_seed

#: An attempt of the client itself (it continues here after another router died) is newer than all attempts of the other router.
ATTEMPTS_PER_CLIENT_ATTEMPT = 1024
#: Number of kept attempts of a choice: the first, and the latest ones.
KEPT_ATTEMPTS = 64
#: A choice that produced more tokens than this since it was sent is not blamed for the loss before.
PROGRESS_TOKENS = 4
#: An Attach is answered between two steps: its time-out is this many seconds plus this many usual steps, which bounds the cost of a gap.
ATTACH_S, ATTACH_STEPS = 1.0, 2


class Breach(msgspec.Struct, frozen=True, gc=False):
    """A replica sent invalid data about a choice."""

    choice: ChoiceState
    why: str


class RequestTableSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state of a :class:`RequestTable` but its measures. By model, ``returned`` and ``fresh``: ids of queued choices,
    in order; ``fair``: whose turn it is."""

    serial: int
    requests: list[RequestSnapshot]
    returned: dict[str, list[int]]
    fresh: dict[str, list[int]]
    fair: dict[str, FairOrderSnapshot]
    counts: dict[str, int]


class RequestTable:
    """``boot``: the router's nonce, part of every message. ``accept_s``: a Submit or Attach without an answer for this time counts as lost.

    ``counts``: totals since the start by event; a choice counts once as ``accepted`` when it is admitted here, and later once as finished,
    failed or cancelled. The names are public, in the status and in ``/metrics``.
    ``stats``: what was measured, by model. ``history``: the stories of the last requests.
    """

    def __init__(self, boot: str, models: Iterable[str], accept_s: float) -> None:
        self._boot, self._accept_s = boot, accept_s
        self.queues: dict[str, WaitingQueue] = {name: WaitingQueue() for name in dict.fromkeys(models)}
        self.stats: dict[str, ModelStats] = {name: ModelStats() for name in self.queues}
        self.requests: dict[int, RequestState] = {}
        self.streams: dict[int, ChoiceState] = {}
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "accepted", "finished", "failed", "cancelled", "resubmitted", "attached", "stale_tokens", "duplicate_tokens", "gaps",
                "replicas_lost", "quarantines", "invalid", "stalled", "refused_hellos", "unknown_speakers", "overloaded",
            ),
            0,
        )  # fmt: skip
        self.history = RequestHistory()
        self._actions: list[Action] = []
        self._breaches: list[Breach] = []
        #: Of the last Tokens message, the indexes of the token lists, and of the prompts' logprobs, that were refused.
        self.invalid_tokens: list[int] = []
        self.invalid_prompts: list[int] = []
        self._serial = 0
        #: The earliest deadline of a request, and of an answer of a replica: most ticks check no choice at all.
        self._next_deadline = self._next_answer = inf

    # --- actions

    def take_actions(self) -> list[Action]:
        """Return the pending actions, in order."""
        actions, self._actions = self._actions, []
        return actions

    def tell(self, peer: bytes, message: ToReplica) -> None:
        """Ask the shell to send ``message``; nothing is sent to an empty address."""
        if peer:
            self._actions.append(SendMessage(peer, message))

    def count(self, name: str) -> None:
        """Add one to a total."""
        self.counts[name] += 1

    # --- finding choices

    def find(self, replica: Replica, stream: int, attempt: int) -> ChoiceState | None:
        """The choice on this stream, if the message is of its present attempt."""
        choice = self.streams.get(stream)
        return choice if choice is not None and choice.attempt_number == attempt and choice.replica is replica else None

    def at(self, replica: Replica) -> list[ChoiceState]:
        """The choices at ``replica``, in the order of their streams."""
        return [self.streams[stream] for stream in replica.streams]

    def counted_by(self, replica: Replica) -> tuple[int, list[int]]:
        """Choices that a heartbeat of ``replica`` can have counted, and the streams of those that wait for their first token."""
        accepted, waiting = 0, []
        for stream, tokens in replica.streams.items():
            choice = self.streams[stream]
            if choice.phase != "sent":
                accepted += not choice.paused
                if tokens:
                    waiting.append(stream)
        return accepted, waiting

    # --- transitions: in

    def admit(self, submitted: SubmitRequest, now: float, deadline: float) -> RequestState:
        """(new) to queued, every choice."""
        spec = submitted.request
        queue = self.queues[spec.model]
        request = RequestState(submitted, queue.order.open(spec.tenant, spec.weight, spec.n), now, deadline)
        for index in range(spec.n):
            seed = choice_seed(spec.params.seed, index)
            params = spec.params if seed == spec.params.seed else msgspec.structs.replace(spec.params, seed=seed)
            choice = ChoiceState(request, self._next(), index, params, spec.emitted[index] if index < len(spec.emitted) else [])
            request.choices.append(choice)
            queue.push(choice)
        request.live = spec.n
        self.requests[request.id] = request
        self._next_deadline = min(self._next_deadline, deadline)
        self.counts["accepted"] += spec.n
        self.stats[spec.model].note_admitted(spec.n, spec.params.max_tokens)
        return request

    def send(
        self, choice: ChoiceState, replica: Replica, placed_because: PlacementReason, *, cached: int | None, expected_s: float, now: float
    ) -> None:
        """queued to sent: a new attempt on a new stream at ``replica``. ``cached`` and ``expected_s``: as :class:`Attempt` has them."""
        request = choice.request
        spec = request.spec
        self.queues[spec.model].send(choice, now)
        choice.sends += 1
        choice.attempt_number = spec.client_attempt * ATTEMPTS_PER_CLIENT_ATTEMPT + choice.sends
        choice.phase, choice.replica, choice.sent_at, choice.emitted_at_send = "sent", replica, now, len(choice.emitted)
        choice.stream, choice.cached_tokens, choice.gap = self._next(), 0, -1
        choice.answer_by = now + self._accept_s
        choice.seen, choice.seen_at, choice.questioned = len(choice.emitted), now, False
        self.streams[choice.stream] = choice
        tokens = max(1, choice.known - (cached or 0))
        replica.add_stream(choice.stream, tokens)
        if len(choice.attempts) == KEPT_ATTEMPTS:
            del choice.attempts[1]
        choice.attempts.append(
            Attempt(
                replica=replica.name, epoch=replica.epoch, number=choice.attempt_number, placed_because=placed_because, tokens=tokens,
                cached=cached, expected_s=expected_s, emitted_before=choice.emitted_at_send, queued_at=choice.queued_at, sent_at=now,
            )
        )  # fmt: skip
        self.stats[spec.model].note_sent(choice.attempts)
        self._settle_credit(choice)
        self._next_answer = min(self._next_answer, choice.answer_by)
        left = request.deadline - now
        self.tell(
            replica.peer,
            Submit(
                boot=self._boot, stream=choice.stream, attempt=choice.attempt_number, client=spec.client, request_id=choice.name,
                model=spec.model, prompt_ids=spec.prompt_ids, salt=spec.salt, deadline_ms=max(1, int(left * 1000)) if left < inf else None,
                marks=spec.marks,
                task=GenerateTask(params=choice.params, emitted=list(choice.emitted), credit=choice.credit),
            ),
        )  # fmt: skip

    def on_accepted(self, replica: Replica, stream: int, attempt: int, now: float) -> None:
        """sent to accepted."""
        choice = self.find(replica, stream, attempt)
        if choice is not None and choice.phase == "sent":
            choice.phase = "accepted"
            choice.attempts[-1].accepted_at = choice.attempts[-1].accepted_at or now

    def on_tokens(self, replica: Replica, message: Tokens, now: float) -> list[ChoiceState]:
        """Apply the output of one step; its choices are running afterwards. Returns the choices that got their first token.

        Deliveries leave in one action without a gap or a repeat. Tokens of an ended attempt are dropped. If the message is invalid for a
        choice, nothing is delivered for it, and :meth:`take_breaches` returns it.
        """
        streams, logprobs = self.streams, message.logprobs
        vocab = replica.capacity.vocab_size
        invalid = _invalid_lists(message, vocab)
        self.invalid_tokens, self.invalid_prompts = invalid, []
        if message.prompt_logprobs or message.cached:
            self._on_prompt_facts(replica, message)
        begun: list[ChoiceState] = []
        deliveries: list[Delivery] = []
        # Choices of one tenant mostly come together: its counter is added to once a run of them.
        account: TenantAccount | None = None
        output = 0
        scores: list[Logprobs] | None
        columns = zip(count(), message.streams, message.attempts, message.firsts, message.tokens)
        for i, stream, attempt, first, tokens in columns:
            choice = streams.get(stream)
            if choice is None or choice.attempt_number != attempt or choice.replica is not replica:
                self._drop_stale(replica, stream, len(tokens), choice)
                continue
            if choice.phase != "running" and self._start_running(choice, now):
                begun.append(choice)
            scores = logprobs[i] if logprobs is not None else None
            emitted = choice.emitted
            position = len(emitted)
            if position != first:
                skip = position - first
                if skip < 0:
                    self.counts["gaps"] += 1
                    if choice.gap == position:
                        self._breaches.append(Breach(choice, f"a gap after {position} tokens, again"))
                    else:
                        choice.gap = position
                        self.reattach(choice, now)
                    continue
                self.counts["duplicate_tokens"] += min(skip, len(tokens))
                tokens, scores = tokens[skip:], scores and scores[skip:]
            if tokens:
                if invalid and i in invalid:
                    self._breaches.append(Breach(choice, f"a token or a logprob that is none of {vocab} ids"))
                    continue
                length = position + len(tokens)
                if length < choice.watch_at:
                    emitted += tokens
                elif length > choice.limit:
                    self._breaches.append(Breach(choice, f"more than {choice.limit} tokens"))
                    continue
                else:
                    emitted += tokens
                    self._settle_credit(choice)
                if choice.account is not account:
                    if account is not None:
                        account.charge_output(output)
                    account, output = choice.account, 0
                output += len(tokens)
                deliveries.append((choice.owner, choice.index, position, tokens, scores))
        if account is not None:
            account.charge_output(output)
        if deliveries:
            self._actions.append(DeliverTokens(deliveries))
        return begun

    def _on_prompt_facts(self, replica: Replica, message: Tokens) -> None:
        """Deliver the data that comes once per choice, with its first tokens: the prompt's logprobs, and the number of cached prompt
        tokens."""
        for index, (stream, prompt) in enumerate(message.prompt_logprobs or ()):
            choice = self.streams.get(stream)
            if choice is not None and choice.replica is replica and not choice.prompt_logprobs_sent:
                if not _fits_prompt(prompt, len(choice.request.spec.prompt_ids), replica.capacity.vocab_size):
                    self.invalid_prompts.append(index)
                    self._breaches.append(Breach(choice, "logprobs that are not those of the prompt"))
                    continue
                choice.prompt_logprobs_sent = True
                self._actions.append(DeliverPromptLogprobs(choice.owner, choice.index, prompt))
        for stream, cached in message.cached or ():
            choice = self.streams.get(stream)
            if choice is not None and choice.replica is replica and not choice.cached_tokens and 0 < cached <= choice.known:
                choice.cached_tokens = cached
                if choice.sends == 1:
                    choice.request.account.find_cached(cached)
                self._actions.append(DeliverCachedTokens(choice.owner, choice.index, cached))

    def take_breaches(self) -> list[Breach]:
        """Return what :meth:`on_tokens` refused, one entry per choice."""
        if not self._breaches:
            return []
        breaches, self._breaches = self._breaches, []
        return list({breach.choice.id: breach for breach in breaches}.values())

    def _start_running(self, choice: ChoiceState, now: float) -> bool:
        """sent or accepted to running. Returns whether this is the attempt's first token; it is true once, even if the choice was
        reattached."""
        assert choice.replica is not None
        choice.phase = "running"
        choice.replica.first_token(choice.stream)
        attempt = choice.attempts[-1]
        if attempt.first_at:
            return False
        attempt.first_at = now
        self.stats[choice.request.spec.model].note_first_token(choice.attempts)
        return True

    def _drop_stale(self, replica: Replica, stream: int, tokens: int, choice: ChoiceState | None) -> None:
        """Count tokens of an ended attempt: its Cancel was lost, or has not arrived yet."""
        self.counts["stale_tokens"] += tokens
        if choice is None:
            self.tell(replica.peer, Cancel(boot=self._boot, stream=stream))

    def add_credit(self, ids: list[int], tokens: list[int]) -> None:
        """Grant ``tokens[i]`` more tokens to every live choice of request ``ids[i]``; each replica gets one message for all of it."""
        grants: dict[Replica, tuple[list[int], list[int]]] = {}
        for id, more in zip(ids, tokens, strict=True):
            request = self.requests.get(id)
            for choice in request.choices if request is not None else ():
                if choice.phase == "ended" or choice.granted >= UNLIMITED:
                    continue
                choice.granted = min(UNLIMITED, choice.granted + more)
                self._settle_credit(choice)
                if choice.replica is not None:
                    streams, counts = grants.setdefault(choice.replica, ([], []))
                    streams.append(choice.stream)
                    counts.append(more)
        for replica, (streams, counts) in grants.items():
            self.tell(replica.peer, Credit(boot=self._boot, streams=streams, tokens=counts))

    def _settle_credit(self, choice: ChoiceState) -> None:
        """Record whether a placed choice is paused; to be called whenever its credit may have ended or returned."""
        choice.watch_at = choice.bound
        paused = choice.credit <= 0
        if choice.replica is not None and paused != choice.paused:
            choice.paused = paused
            choice.replica.pause_stream(paused)
            choice.request.account.pause(paused)

    # --- transitions: again

    def reattach(self, choice: ChoiceState, now: float) -> None:
        """sent, accepted or running to sent: ask the replica for everything after the received tokens, on a new stream."""
        replica, spec = choice.replica, choice.request.spec
        assert replica is not None
        old, choice.stream = choice.stream, self._next()
        del self.streams[old]
        self.streams[choice.stream] = choice
        replica.move_stream(old, choice.stream)
        choice.phase, choice.sent_at = "sent", now
        choice.attempts[-1].reattached += 1
        choice.answer_by = now + min(self._accept_s, ATTACH_S + ATTACH_STEPS * replica.step_ms / 1000.0)
        self._next_answer = min(self._next_answer, choice.answer_by)
        self.counts["attached"] += 1
        self.tell(
            replica.peer,
            Attach(
                boot=self._boot, stream=choice.stream, attempt=choice.attempt_number, client=spec.client, request_id=choice.name,
                have=len(choice.emitted), credit=choice.credit,
            ),
        )  # fmt: skip

    def requeue(self, choice: ChoiceState, cause: Cause, now: float, *, cancel: bool) -> None:
        """sent, accepted or running to queued, before all new choices: it continues at another replica after the received tokens.
        ``cancel``: send Cancel to the replica."""
        self._release(choice, cancel=cancel)
        self._lose_attempt(choice, cause, now)
        choice.phase, choice.queued_at = "queued", now
        self.queues[choice.request.spec.model].push_returned(choice)
        self.counts["resubmitted"] += 1

    def question(self, choice: ChoiceState, now: float) -> None:
        """:meth:`reattach` a choice without progress: a replica that has lost it answers ``not_found``, and it continues at another one."""
        choice.questioned = True
        self.reattach(choice, now)

    def requeue_short(self, choice: ChoiceState, now: float) -> bool:
        """:meth:`requeue` a choice whose Done came before its last token. Once only; returns False if it has happened before."""
        self.counts["gaps"] += 1
        if choice.ended_short:
            return False
        choice.ended_short = True
        self.requeue(choice, "short", now, cancel=False)
        return True

    def blame(self, choices: list[ChoiceState], limit: int) -> list[ChoiceState]:
        """Count this death against the choices that the replica had accepted; return those to fail.

        A request that crashes replicas does so at about the same token each time, so the count of a choice that made progress restarts at
        1. If some at the ``limit`` never produced a token, only those are failed.
        """
        accepted = [choice for choice in choices if choice.phase != "sent"]
        for choice in accepted:
            self.count_death(choice)
        suspects = [choice for choice in accepted if choice.deaths >= limit]
        return [choice for choice in suspects if len(choice.emitted) == choice.resumed_from] or suspects

    def count_death(self, choice: ChoiceState) -> int:
        """Count the end of an attempt that the choice may have caused; returns how many there were one after the other."""
        choice.deaths = 1 if len(choice.emitted) - choice.emitted_at_send > PROGRESS_TOKENS else choice.deaths + 1
        return choice.deaths

    # --- transitions: out

    def finish(self, choice: ChoiceState, reason: FinishReason, usage: Usage, stop_id: int | None, now: float) -> None:
        """To ended: the answer is complete."""
        self.stats[choice.request.spec.model].note_end(choice.attempts, now, usage.cached_tokens)
        self._release(choice, cancel=False)
        self._end(choice, "finished", reason, now)
        self._actions.append(FinishChoice(choice.owner, choice.index, reason, usage, stop_id))

    def fail(self, choice: ChoiceState, error: TriremeError, now: float, *, cancel: bool = True, cause: Cause | None = None) -> None:
        """To ended, with an error. ``cancel``: send Cancel to the replica. ``cause``: the reason why its attempt was lost."""
        if cause is not None:
            self._lose_attempt(choice, cause, now)
        self.stats[choice.request.spec.model].note_failure(choice.attempts)
        self._release(choice, cancel=cancel)
        self._end(choice, "failed", error.code, now)
        self._actions.append(FailChoice(choice.owner, choice.index, error))

    def cancel(self, choice: ChoiceState, now: float) -> None:
        """To ended: its client is gone, and its frontend knows. Does nothing if it has ended."""
        if choice.phase != "ended":
            self._release(choice, cancel=True)
            self._end(choice, "cancelled", "the caller left", now)

    def stop_choice(self, choice: ChoiceState, now: float) -> None:
        """To ended: its frontend needs no more tokens. Does nothing if it has ended."""
        if choice.phase != "ended":
            self.stats[choice.request.spec.model].note_end(choice.attempts, now, choice.cached_tokens)
            self._release(choice, cancel=True)
            self._end(choice, "cancelled", "the frontend stopped it", now)

    def _lose_attempt(self, choice: ChoiceState, cause: Cause, now: float) -> None:
        attempt = choice.attempts[-1]
        attempt.cause, attempt.ended_at = cause, now
        self.stats[choice.request.spec.model].note_moved(cause)

    def _release(self, choice: ChoiceState, *, cancel: bool) -> None:
        """Remove it from the queue or from its stream; ``cancel``: send Cancel to the replica."""
        replica = choice.replica
        if replica is None:
            self.queues[choice.request.spec.model].remove(choice)
            return
        del self.streams[choice.stream]
        replica.remove_stream(choice.stream, paused=choice.paused)
        if choice.paused:
            choice.request.account.pause(False)
        choice.replica, choice.paused = None, False
        if cancel:
            self.tell(replica.peer, Cancel(boot=self._boot, stream=choice.stream, attempt=choice.attempt_number))

    def _end(self, choice: ChoiceState, end: End, detail: str, now: float) -> None:
        """A released choice is over, and its request too if it was the last."""
        request = choice.request
        choice.phase, choice.end, choice.end_detail, choice.ended_at = "ended", end, detail, now
        self.counts[end] += 1
        self.queues[request.spec.model].order.close(request.account)
        request.live -= 1
        if not request.live:
            del self.requests[request.id]
            self.history.add(request.story())

    # --- time

    def expire_deadlines(self, now: float) -> None:
        """Fail the choices of requests whose deadline has passed."""
        if now < self._next_deadline:
            return
        for request in [request for request in self.requests.values() if now >= request.deadline]:
            limit = request.deadline - request.arrived
            for choice in request.choices:
                if choice.phase != "ended":
                    why = f"it was {choice.phase}"
                    self.fail(choice, DeadlineExceeded(f"the request was not done within its {limit:.1f} s", why), now)
        self._next_deadline = min((request.deadline for request in self.requests.values()), default=inf)

    def requeue_unanswered(self, now: float) -> None:
        """Requeue the choices whose Submit or Attach was not answered in time."""
        if now < self._next_answer:
            return
        sent = [choice for choice in self.streams.values() if choice.phase == "sent"]
        for choice in sent:
            if now >= choice.answer_by:
                self.requeue(choice, "unanswered", now, cancel=True)
        self._next_answer = min((choice.answer_by for choice in sent if choice.phase == "sent"), default=inf)

    def note_progress(self, now: float) -> None:
        """Check which choices made progress since the last call: they have more tokens, or need none now."""
        for choice in self.streams.values():
            if choice.paused or len(choice.emitted) != choice.seen:
                choice.seen, choice.seen_at, choice.questioned = len(choice.emitted), now, False
            elif choice.phase == "sent" and not choice.questioned:
                choice.seen_at = now

    # --- what happened, and snapshots

    def stories(self, request_id: str) -> list[RequestStory]:
        """What happened to the requests with this id, their own or their caller's: the kept ones that have ended, then the live ones."""
        if not request_id:
            return []  # an empty caller_id is no id
        live = [request.story() for request in self.requests.values() if request_id in (request.spec.request_id, request.caller_id)]
        return self.history.find(request_id) + live

    def snapshot(self) -> RequestTableSnapshot:
        ids = {model: queue.ids() for model, queue in self.queues.items()}
        return RequestTableSnapshot(
            serial=self._serial,
            requests=[request.snapshot() for request in self.requests.values()],
            returned={model: returned for model, (returned, _) in ids.items()},
            fresh={model: fresh for model, (_, fresh) in ids.items()},
            fair={model: queue.order.snapshot() for model, queue in self.queues.items()},
            counts=dict(self.counts),
        )

    def restore(self, found: RequestTableSnapshot, registry: ReplicaRegistry) -> None:
        """Take over the state that ``found`` was taken of; only into an empty table. Prompts and tokens have their lengths alone, and
        nobody owns the requests. ``registry``: restored from the same moment."""
        assert not self.requests and not self._serial
        self._serial = found.serial
        self.counts.update(found.counts)
        self.queues = {model: WaitingQueue(found.fair[model]) for model in self.queues}
        choices: dict[int, ChoiceState] = {}
        for one in found.requests:
            params = SamplingParams(max_tokens=one.max_tokens)
            spec = RouterRequest(
                client="", request_id=one.request_id, model=one.model, prompt_ids=[0] * one.prompt_tokens, params=params,
                n=len(one.choices), client_attempt=one.client_attempt, tenant=one.tenant, priority=one.priority,
            )  # fmt: skip
            deadline = one.deadline if one.deadline is not None else inf
            live = sum(choice.phase != "ended" for choice in one.choices)
            account = self.queues[one.model].order.restore(one.tenant, live)
            request = RequestState(SubmitRequest(id=one.id, request=spec, session=one.session), account, one.arrived, deadline)
            request.choices = [ChoiceState.restored(request, index, choice, registry) for index, choice in enumerate(one.choices)]
            request.live = live
            self.requests[one.id] = request
            self._next_deadline = min(self._next_deadline, deadline)
            choices.update((choice.id, choice) for choice in request.choices)
            for choice in request.choices:
                for attempt in choice.attempts:
                    if attempt.cause:
                        self.stats[one.model].note_moved(attempt.cause)
        for model, queue in self.queues.items():
            for id in found.returned[model]:
                queue.push_returned(choices[id])
            for id in found.fresh[model]:
                queue.push_again(choices[id])
        placed = [choice for choice in choices.values() if choice.replica is not None]
        for choice in placed:
            if choice.paused:
                choice.request.account.pause(True)
        self.streams = {choice.stream: choice for choice in sorted(placed, key=lambda choice: choice.stream)}
        self._next_answer = min((choice.answer_by for choice in placed), default=inf)

    def _next(self) -> int:
        """A new number, for ids of choices and streams."""
        self._serial += 1
        return self._serial

    def check(self, registry: ReplicaRegistry) -> None:
        """Assert that every live choice is in exactly one place and that every index and sum agrees."""
        registry.check()
        for queue in self.queues.values():
            queue.check()
        live_choices = 0
        for request in self.requests.values():
            live = [choice for choice in request.choices if choice.phase != "ended"]
            assert live and request.live == len(live), f"request {request.id}: live count"
            live_choices += len(live)
            for choice in live:
                queued = choice in self.queues[request.spec.model]
                assert queued == (choice.phase == "queued"), f"choice {choice.id}: {choice.phase} but queued={queued}"
                assert (choice.replica is None) == queued, f"choice {choice.id}: a stream and a place in the queue"
                if choice.replica is not None:
                    assert self.streams.get(choice.stream) is choice and choice.stream in choice.replica.streams, (
                        f"choice {choice.id}: stream"
                    )
                    assert choice.paused == (choice.credit <= 0), f"choice {choice.id}: paused or not"
                    assert choice.watch_at == choice.bound, f"choice {choice.id}: where to look at it"
                    assert choice.replica.state != "lost" and registry.replicas.get(choice.replica.name) is choice.replica
        replicas = registry.replicas.values()
        assert live_choices == len(self.streams) + sum(map(len, self.queues.values())), "a choice is in no place or in two"
        assert len(self.streams) == sum(len(replica.streams) for replica in replicas), "streams differ"
        assert sum(choice.paused for choice in self.streams.values()) == sum(replica.paused for replica in replicas), "paused"
        for queue in self.queues.values():
            queue.check()
        ended = self.counts["finished"] + self.counts["failed"] + self.counts["cancelled"]
        assert self.counts["accepted"] == ended + live_choices, "a choice ended twice or never"
        for model, stats in self.stats.items():
            for cause, moved in stats.moved.items():
                assert stats.resumed[cause] + stats.failed[cause] <= moved, f"{model}: more came of choices that moved ({cause}) than did"


def _invalid_lists(message: Tokens, vocab: int) -> list[int]:
    """Indexes of the token lists with an id, or with logprobs, that no model with ``vocab`` ids gives. (No negative id is decoded.)"""
    invalid: list[int] = []
    if max(chain.from_iterable(message.tokens), default=0) >= vocab:
        invalid += [i for i, tokens in enumerate(message.tokens) if max(tokens, default=0) >= vocab]
    for i, scores in enumerate(message.logprobs or ()):
        if scores is not None and ([score.token for score in scores] != message.tokens[i] or not _fit_vocab(scores, vocab)):
            invalid.append(i)
    return invalid


def _fits_prompt(scores: list[Logprobs], length: int, vocab: int) -> bool:
    return not scores or (len(scores) == length and _fit_vocab(scores, vocab))


def _fit_vocab(scores: list[Logprobs], vocab: int) -> bool:
    return all(
        0 <= score.token < vocab
        and len(score.top_ids) == len(score.top_logprobs)
        and (not score.top_ids or (min(score.top_ids) >= 0 and max(score.top_ids) < vocab))
        for score in scores
    )
