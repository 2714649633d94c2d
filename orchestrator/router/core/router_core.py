"""The routing core: the placement of every request, and the delivery of its tokens.

A pure state machine: :meth:`RouterCore.handle` takes one event with its time and returns actions. It never reads a clock, a socket or a
random number; the simulator and the replay of a dump run this same object.

Owns three parts, each the only writer of its own state: the :class:`~orchestrator.router.core.request_table.RequestTable` (every accepted
request until its last token), the :class:`~orchestrator.router.core.replica_registry.ReplicaRegistry`, and the data by which a replica is
chosen (sessions, prefixes, service rates). It evaluates events and calls the transitions of those.

Bounds: ``max_queue`` choices waiting per model (choices that lost their replica are queued even above it), ``max_batch_size`` + lookahead
choices in flight per replica, a deadline on everything that waits. Terminal actions: exactly one of ``FinishChoice`` and ``FailChoice`` a
choice, unless its frontend ended it by ``StopChoice`` or ``CancelRequest``.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Literal, assert_never

import msgspec

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.actions import Action
from orchestrator.router.core.choice_state import ChoiceState
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
from orchestrator.router.core.policy import DEFAULT_POLICY, POLICIES, PlacementQuery, RoutingPolicy
from orchestrator.router.core.prefix_index import PrefixIndexes, PrefixLookup
from orchestrator.router.core.replica_registry import MAX_PLACED, HelloRefused, Replica, ReplicaRegistry, ReplicaSnapshot
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.request_table import RequestTable, RequestTableSnapshot
from orchestrator.router.core.service_rate import ServiceRate, ServiceRateSnapshot
from orchestrator.router.core.session_table import SessionTable
from orchestrator.router.core.stats import LossKind
from orchestrator.router.core.wait_estimate import predicted_first_token_s
from orchestrator.router.core.waiting_queue import WaitingQueue
from workers.protocol.errors import DeadlineExceeded, EngineFault, NotFound, Overloaded, ReplicaLost, TenantLimit, Unavailable, from_code
from workers.protocol.messages import Accepted, Bye, Done, Failed, Heartbeat, Hello, RouterHeartbeat, Tokens, Usage

#: Error codes with which a replica returns a choice unchanged: another replica may run it.
REFUSALS = frozenset({"replica_lost", "overloaded", "unavailable", "not_found"})
#: A Submit that was not answered for this long (seconds) counts as lost, although the replica lives.
ACCEPT_S = 5.0
#: Seconds between two checks of the choices' progress.
PROGRESS_S = 0.5


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a routing core, for a dump. The router's peers are not included: they are addresses and keys."""

    boot: str
    router: str
    models: list[str]
    admission: AdmissionSpec
    replica_timeout_s: float
    hang_floor_s: float
    accept_s: float
    policy: str


class CoreSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state of a :class:`RouterCore` between two events, except its statistics and its prefix index."""

    closing: bool
    replicas: list[ReplicaSnapshot]
    table: RequestTableSnapshot
    sessions: dict[str, str]
    rates: dict[str, ServiceRateSnapshot]
    progress_due: float


class RouterCore:
    """State of one router. ``greeting``: its answer to Hello; the nonce in it is in every message. ``policy``: by default the one of
    :data:`~orchestrator.router.core.policy.DEFAULT_POLICY`."""

    def __init__(
        self, greeting: RouterHeartbeat, models: Iterable[str], admission: AdmissionSpec, registry: ReplicaRegistry, *,
        accept_s: float = ACCEPT_S, policy: RoutingPolicy | None = None, prefixes: PrefixLookup | None = None,
    ) -> None:  # fmt: skip
        self.boot, self._greeting, self.registry = greeting.boot, greeting, registry
        self._admission, self._accept_s = admission, accept_s
        self._table = RequestTable(self.boot, models, accept_s)
        self._policy = policy if policy is not None else POLICIES[DEFAULT_POLICY]()
        self._prefixes: PrefixLookup = prefixes if prefixes is not None else PrefixIndexes()
        self._sessions = SessionTable()
        self._rates = {model: ServiceRate() for model in self._table.queues}
        self.closing = False
        self._progress_due = 0.0
        self.counts, self.stats = self._table.counts, self._table.stats
        #: The prefix lookup's answers during the last event: one list per placement with several known replicas.
        self.prefix_answers: list[list[int]] = []

    def handle(self, event: RouterEvent, now: float) -> list[Action]:
        """Handle one event; ``now`` is its time, seconds, never less than that of the previous event. Returns the actions, in order.

        Raises NotFound, Overloaded (with ``retry_after``), Unavailable (closing) and DeadlineExceeded for a ``SubmitRequest`` that is not
        accepted; nothing is delivered for it.
        """
        self.prefix_answers = []
        match event:
            case ReplicaMessage():
                self._on_message(event, now)
            case AddCredit():
                self._table.add_credit(event.ids, event.tokens)
            case SubmitRequest():
                self._on_submit(event, now)
            case StopChoice():
                self._on_stop(event, now)
            case CancelRequest():
                self._on_cancel(event, now)
            case Tick():
                self._on_tick(now)
            case PeerUnreachable():
                replica = self.registry.at(event.peer)
                if replica is not None:
                    self._lose(replica, "unreachable", "unreachable", now)
            case StopAccepting():
                self.closing = True
            case AbortAll():
                self._on_abort(now)
            case _:
                assert_never(event)
        return self._table.take_actions()

    # --- what frontends do

    def _on_submit(self, event: SubmitRequest, now: float) -> None:
        request, model = event.request, event.request.model
        queue = self._table.queues.get(model)
        if queue is None:
            raise NotFound(f"the model {model[:64]!r} does not exist", code="model_not_found", param="model")
        if self.closing:
            raise Unavailable("the router is shutting down", "", "ask another router", retry_after=1.0)
        if request.deadline_s is not None and request.deadline_s <= 0:
            raise DeadlineExceeded("the request's deadline has passed", "it arrived with no time left")
        self._check_room(request, queue, now)
        limit = self._admission.request_timeout_s or inf
        self._table.admit(event, now, now + min(limit, request.deadline_s if request.deadline_s is not None else inf))
        self._place_waiting(model, now)

    def _check_room(self, request: RouterRequest, queue: WaitingQueue, now: float) -> None:
        """Raises Overloaded if ``request`` has no room in ``queue``, and TenantLimit if only its tenant has none.

        A tenant may fill the queue while nobody else needs it. Above its bounds only tenants within their share are let in, up to twice
        the bounds: so a full queue of one tenant refuses nobody else, and nobody is dropped for them.
        """
        spec, model = self._admission, request.model
        account = queue.order.find(request.tenant)
        waiting, waiting_tokens = (account.waiting, account.waiting_tokens) if account is not None else (0, 0)
        # Free places count for an empty queue only: where choices wait, the policy has left those places free, or there are none. They are
        # those of the replicas that :meth:`_place_waiting` sends to.
        free = 0 if queue else sum(replica.free_places for replica in self.registry.trusted(model))
        tokens, share = request.n * len(request.prompt_ids), max(1, spec.share_of(spec.max_queue))
        token_share = spec.share_of(spec.max_queued_tokens)
        within = waiting + request.n <= share and waiting_tokens + tokens <= token_share
        factor = 2 if within else 1
        fits = len(queue) + request.n <= factor * spec.max_queue + free
        if fits and (not queue or queue.tokens + tokens <= factor * spec.max_queued_tokens):
            return
        self._table.count("overloaded")
        retry_after = self._rates[model].retry_after(len(queue), now)
        if not within and waiting and queue.order.has_others(request.tenant):
            what = f"{waiting} choices of this tenant wait for {model!r}, with {waiting_tokens} prompt tokens"
            why = f"the queue is full, and one tenant's share of it is {share} choices and {token_share} tokens"
            raise TenantLimit(what, why, "retry later", retry_after=retry_after)
        why = "their prompts are too long together" if fits else "the queue is full"
        raise Overloaded(f"{len(queue)} choices wait for {model!r} already", why, "retry later", retry_after=retry_after)

    def _is_paused_out(self, paused: int, model: str) -> bool:
        """Whether a tenant with so many paused choices at replicas gets none of the places that are reserved for others."""
        if not paused:
            return False
        places = sum(MAX_PLACED * replica.capacity.max_batch_size for replica in self.registry.serving(model))
        return paused >= max(1, self._admission.share_of(places))

    def _on_cancel(self, event: CancelRequest, now: float) -> None:
        request = self._table.requests.get(event.id)
        if request is not None:
            for choice in request.choices:
                self._table.cancel(choice, now)
            self._place_waiting(request.spec.model, now)

    def _on_stop(self, event: StopChoice, now: float) -> None:
        request = self._table.requests.get(event.id)
        if request is not None:
            self._table.stop_choice(request.choices[event.choice], now)
            self._place_waiting(request.spec.model, now)

    def _on_abort(self, now: float) -> None:
        for request in list(self._table.requests.values()):
            for choice in request.choices:
                if choice.phase != "ended":
                    error = Unavailable("the router stopped", "its grace period is over", "retry at another router", retry_after=1.0)
                    self._table.fail(choice, error, now)
        for replica in self.registry.replicas.values():
            if replica.state != "lost":
                self._table.tell(replica.peer, Bye(boot=self.boot, reason="closing"))

    # --- what replicas say

    def _on_message(self, event: ReplicaMessage, now: float) -> None:
        peer, user, message = event.peer, event.user, event.message
        if isinstance(message, Hello):
            self._on_hello(peer, user, message, now)
            return
        if isinstance(message, Bye):
            leaver = self.registry.at(peer)
            if leaver is not None and leaver.user == user:
                self._lose(leaver, "left", f"said goodbye: {message.reason}", now)
            return
        replica, moved = self.registry.speaker(peer, user, message.boot)
        if replica is None:
            self._table.count("unknown_speakers")
            if isinstance(message, Heartbeat):
                # The greeting has this router's nonce: a leader that has not said Hello to this process does so.
                self._table.tell(peer, self._greeting)
            return
        replica.note_heard(now)
        if moved:
            self._reattach_all(replica, now)
        match message:
            case Tokens():
                for choice in self._table.on_tokens(replica, message, now):
                    self._policy.on_first_token(replica.name, now - choice.attempts[-1].sent_at)
                for breach in self._table.take_breaches():
                    self._distrust(replica, breach.choice, "invalid", f"it sent {breach.why}", now)
            case Heartbeat():
                self._on_heartbeat(replica, message, now)
            case Accepted():
                self._table.on_accepted(replica, message.stream, message.attempt, now)
            case Done():
                self._on_done(replica, message, now)
            case Failed():
                self._on_failed(replica, message, now)
            case _:
                assert_never(message)
        if replica.state == "ready":
            self._place_waiting(replica.model, now)

    def _on_hello(self, peer: bytes, user: str, hello: Hello, now: float) -> None:
        verdict = self.registry.hello(peer, user, hello, now) if hello.model in self._table.queues else HelloRefused("model")
        if isinstance(verdict, HelloRefused):
            self._table.count("refused_hellos")
            self._table.tell(peer, Bye(boot=self.boot, reason=verdict.reason))
            return
        if verdict.replaced is not None:
            old = verdict.replaced
            if old.peer != peer and old.state != "lost":
                self._table.tell(old.peer, Bye(boot=self.boot, reason="stale"))
            self._lose(old, "replaced", "replaced by a newer process", now)
        self._table.tell(peer, self._greeting)
        if not verdict.fresh:
            self._reattach_all(verdict.replica, now)
        self._place_waiting(hello.model, now)

    def _on_heartbeat(self, replica: Replica, heartbeat: Heartbeat, now: float) -> None:
        lost = self.registry.judge(replica, heartbeat, now)
        if lost:
            self._lose(replica, "hung", lost, now)
            return
        if heartbeat.stats.prefixes:
            self._prefixes.note_cached(replica, heartbeat.stats.prefixes)
        accepted, waiting = self._table.counted_by(replica)
        replica.heartbeat(heartbeat, accepted, waiting, now)

    def _on_done(self, replica: Replica, done: Done, now: float) -> None:
        choice = self._table.find(replica, done.stream, done.attempt)
        if choice is None:
            return
        emitted = len(choice.emitted)
        if done.usage.output_tokens > emitted:
            # The end arrived, but tokens before it did not. The choice has ended at this replica, so it continues at another one.
            if not self._table.requeue_short(choice, now):
                why = f"it counts {done.usage.output_tokens} tokens, {emitted} arrived"
                error = EngineFault("a replica ended the request before its last token", why, "retry")
                self._table.fail(choice, error, now, cancel=False)
            return
        if done.usage.output_tokens < emitted or done.reason == "cancelled":
            why = f"an end ({done.reason}) after {done.usage.output_tokens} of {emitted} tokens that nobody asked for"
            self._distrust(replica, choice, "invalid", f"it sent {why}", now)
            return
        self._rates[replica.model].note_end(emitted, now)
        self._policy.on_end(replica.name, emitted)
        replica.note_end(now - choice.sent_at)
        if not self._alone:
            self._prefixes.note_end(choice, replica)
        cached = min(done.usage.cached_tokens, choice.known)
        # The tokens in a request's usage are counted here.
        prompt = len(choice.request.spec.prompt_ids)
        usage = Usage(prompt_tokens=prompt, output_tokens=emitted, cached_tokens=cached, preemptions=done.usage.preemptions)
        self._table.finish(choice, done.reason, usage, done.stop_id, now)

    def _on_failed(self, replica: Replica, failed: Failed, now: float) -> None:
        choice = self._table.find(replica, failed.stream, failed.attempt)
        if choice is None:
            return
        if failed.code in REFUSALS:
            if failed.code != "not_found":  # a replica that does not know the choice has lost only this choice
                replica.refuse()
            self._table.requeue(choice, "refused", now, cancel=False)
            return
        if failed.code == "nan_logits" and replica.add_fault(now):
            self._table.count("quarantines")
        self._table.fail(choice, from_code(failed.code, failed.message, retry_after=failed.retry_after), now, cancel=False)

    def _distrust(self, replica: Replica, choice: ChoiceState, cause: Literal["invalid", "stalled"], why: str, now: float) -> None:
        """``choice`` continues at another replica, and ``replica`` is put into quarantine, because no request can cause its invalid
        message. If this happens to one choice repeatedly, the choice fails."""
        self._table.count(cause)
        if replica.distrust(why, now):
            self._table.count("quarantines")
        if self._table.count_death(choice) >= self._admission.replica_limit:
            error = EngineFault(f"{choice.deaths} attempts of this request ended by a fault of a replica", why, "retry")
            self._table.fail(choice, error, now, cause=cause)
        else:
            self._table.requeue(choice, cause, now, cancel=True)

    def _check_progress(self, now: float) -> None:
        """Send Attach to the replicas of choices without progress; move a choice if its replica was asked before and made no progress."""
        if now < self._progress_due:
            return
        self._progress_due = now + PROGRESS_S
        self._table.note_progress(now)
        for replica in self.registry.replicas.values():
            bound_s = self.registry.progress_bound_s(replica)
            for choice in self._table.at(replica):
                stalled_s = now - max(choice.seen_at, replica.explained_at)
                if stalled_s > bound_s:
                    why = f"it made no progress with a request for {stalled_s:.1f} s, although nothing was ahead of it"
                    self._distrust(replica, choice, "stalled", why, now)
                elif stalled_s > bound_s / 2 and not choice.questioned:
                    self._table.question(choice, now)

    def _lose(self, replica: Replica, loss: LossKind, why: str, now: float) -> None:
        """Put the choices of a lost replica back into the queue: before all new choices, after those that returned earlier. Unless the
        replica ``left`` by itself, one of them may have crashed it, so choices that were involved in too many losses fail."""
        if not self.registry.lose(replica, why, now):
            return
        self._prefixes.forget(replica)
        self._table.count("replicas_lost")
        self.stats[replica.model].losses[loss] += 1
        choices = self._table.at(replica)
        guilty = self._table.blame(choices, self._admission.replica_limit) if loss != "left" else []
        for choice in choices:
            # The replica gets Cancel in both cases: if it was only stopped or cut off, it would continue with the choice.
            if choice in guilty:
                error = ReplicaLost(
                    f"{choice.deaths} replicas were lost while they ran this request",
                    why,
                    "the request may be what ends them",
                    code="replica_limit",
                )
                self._table.fail(choice, error, now, cause=loss)
            else:
                self._table.requeue(choice, loss, now, cancel=True)
        self._place_waiting(replica.model, now)

    def _reattach_all(self, replica: Replica, now: float) -> None:
        """Messages may have been lost with the old connection: send Attach for every choice."""
        for choice in self._table.at(replica):
            self._table.reattach(choice, now)

    # --- time

    def _on_tick(self, now: float) -> None:
        for replica in self.registry.silent(now):
            self._lose(replica, "silent", f"silent for {now - replica.seen:.1f} s", now)
        self.registry.end_quarantines(now)
        self.registry.forget(now)
        self._table.expire_deadlines(now)
        self._table.requeue_unanswered(now)
        self._check_progress(now)
        for model, queue in self._table.queues.items():
            self._place_waiting(model, now)
            if queue and self._admission.queue_timeout_s:
                self._expire_queue(model, now)

    def _expire_queue(self, model: str, now: float) -> None:
        limit = self._admission.queue_timeout_s
        queue = self._table.queues[model]
        for choice in queue.since(now - limit):
            waited = f"the request waited {limit:.0f} s for a replica of {model!r}"
            retry = self._rates[model].retry_after(len(queue), now)
            if any(replica.state == "ready" for replica in self.registry.serving(model)):
                self._table.fail(choice, Overloaded(waited, "all are busy", "retry later", retry_after=retry), now)
            else:
                hint = "retry later, or see `trireme status`"
                self._table.fail(choice, Unavailable(waited, "none is ready", hint, retry_after=retry), now)

    # --- placing

    @property
    def _alone(self) -> bool:
        """A prefix lookup for a single replica: there is no alternative, so nothing is stored."""
        return len(self.registry.replicas) == 1

    def _place_waiting(self, model: str, now: float) -> None:
        """Send waiting choices to replicas, as many as there is room for."""
        queue = self._table.queues[model]
        if queue.order.held:
            room = any(replica.free_places for replica in self.registry.trusted(model))
            for account in [one for one in queue.order.held if room or not self._is_paused_out(one.paused, model)]:
                queue.order.release(account)
        while (choice := queue.first(now)) is not None:
            if now >= choice.request.deadline:
                self._table.expire_deadlines(now)  # nothing is computed for a client that no longer waits
                continue
            if 0 < choice.params.max_tokens <= len(choice.emitted):
                # All its tokens have arrived, only its Done was lost. (Of no tokens, a replica is asked to score the prompt.)
                prompt = len(choice.request.spec.prompt_ids)
                usage = Usage(prompt_tokens=prompt, output_tokens=len(choice.emitted), cached_tokens=choice.cached_tokens)
                self._table.finish(choice, "length", usage, None, now)
                continue
            paused_out = self._is_paused_out(choice.request.account.paused, model)
            trusted = self.registry.trusted(model)
            candidates = [replica for replica in trusted if (replica.free_places if paused_out else replica.reserved_places)]
            if not candidates and paused_out and any(replica.reserved_places for replica in trusted) and queue.hold(choice):
                continue  # the next tenant may have a place
            if not candidates or not self._place(choice, candidates, now):
                return

    def _place(self, choice: ChoiceState, candidates: list[Replica], now: float) -> bool:
        """Send ``choice`` to the policy's replica; False = it waits."""
        request, alone = choice.request, self._alone
        if alone:
            cached = [0]
        else:
            cached = self._prefixes.cached_tokens(request, candidates)
            self.prefix_answers.append(cached)
        query = PlacementQuery(
            model=request.spec.model,
            known_tokens=choice.known,
            cached_tokens=cached,
            session_replica=self._sessions.replica_of(request.session) if request.session else "",
            output_tokens=self._rates[request.spec.model].output_tokens,
        )
        chosen = self._policy.choose(query, candidates)
        if chosen is None:
            return False
        index, placed_because = chosen
        replica = candidates[index]
        expected_s = predicted_first_token_s(
            step_ms=replica.step_ms, occupancy=replica.occupancy, max_batch_size=replica.capacity.max_batch_size,
            step_tokens=replica.capacity.max_num_tokens, queued_tokens=replica.queued_tokens,
            new_tokens=query.known_tokens - cached[index], choice_ms=replica.choice_ms,
        )  # fmt: skip
        self._table.send(choice, replica, placed_because, cached=None if alone else cached[index], expected_s=expected_s, now=now)
        self._policy.on_sent(query, replica.name)
        if not alone:
            self._prefixes.note_sent(request, replica)
            self._sessions.note_sent(request.session, replica.name)
        return True

    # --- what is known

    @property
    def invalid(self) -> tuple[list[int], list[int]]:
        """Of the last Tokens message, the indexes of the token lists, and of the prompts' logprobs, that were refused."""
        return self._table.invalid_tokens, self._table.invalid_prompts

    def waiting(self, model: str) -> int:
        """Choices in the model's queue."""
        return len(self._table.queues[model])

    @property
    def models(self) -> Iterable[str]:
        return self._table.queues.keys()

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._table.requests)

    @property
    def placed(self) -> int:
        """Choices at replicas."""
        return len(self._table.streams)

    def stories(self, request_id: str) -> list[RequestStory]:
        """The kept stories of the requests with this id."""
        return self._table.stories(request_id)

    def check(self) -> None:
        """Assert that every live choice is in exactly one place and that every index and sum agrees."""
        self._table.check(self.registry)

    # --- snapshots

    def settings(self) -> CoreSettings:
        return CoreSettings(
            boot=self.boot, router=self._greeting.router, models=list(self.models), admission=self._admission,
            replica_timeout_s=self.registry.replica_timeout_s, hang_floor_s=self.registry.hang_floor_s, accept_s=self._accept_s,
            policy=self._policy.name,
        )  # fmt: skip

    def snapshot(self) -> CoreSnapshot:
        return CoreSnapshot(
            closing=self.closing,
            replicas=[replica.snapshot() for replica in self.registry.replicas.values()],
            table=self._table.snapshot(),
            sessions=self._sessions.snapshot(),
            rates={model: rate.snapshot() for model, rate in self._rates.items()},
            progress_due=self._progress_due,
        )

    @classmethod
    def restored(cls, settings: CoreSettings, found: CoreSnapshot, prefixes: PrefixLookup) -> RouterCore:
        """The core that ``found`` was taken of, without the measures; ``prefixes`` answers for the caches."""
        registry = ReplicaRegistry(settings.replica_timeout_s, settings.hang_floor_s, found.replicas)
        core = cls(
            RouterHeartbeat(boot=settings.boot, router=settings.router), settings.models, settings.admission, registry,
            accept_s=settings.accept_s, policy=POLICIES[settings.policy](), prefixes=prefixes,
        )  # fmt: skip
        core.closing, core._progress_due = found.closing, found.progress_due
        core._table.restore(found.table, registry)
        core._sessions = SessionTable(found.sessions)
        core._rates = {model: ServiceRate(rate.ends, rate.output_tokens) for model, rate in found.rates.items()}
        return core
