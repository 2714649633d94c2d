"""The routing core: which request runs where, and what its client has been given.

Owns every accepted request until its last token, the queues, and (through
:class:`~orchestrator.router.core.replica_registry.ReplicaRegistry`) the replica table. A pure state machine: each method is one event with
its time, what must be done about it collects in :meth:`RouterCore.take`. Never reads a clock, a socket or a random number; the simulator
runs this same object.

Bounds: ``max_queue`` rows waiting per model (rows that lost their replica are let in above it), ``max_batch_size`` + lookahead rows in
flight per replica, a deadline on everything that waits. Terminal messages: exactly one of Finished and Errored a choice, unless its door
ended it by :meth:`RouterCore.finish` or :meth:`RouterCore.cancel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

import msgspec

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.policy import LeastWaitPolicy
from orchestrator.router.core.replica_registry import HelloRefused, Replica, ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.request_state import (
    Action,
    ChoiceState,
    DeliverPromptLogprobs,
    DeliverTokens,
    Delivery,
    RequestState,
    SendMessage,
)
from orchestrator.router.core.request_table import RequestTable
from orchestrator.router.core.stats import LossKind
from orchestrator.router.core.transitions import Transitions
from workers.protocol.errors import DeadlineExceeded, EngineFault, NotFound, Overloaded, ReplicaLost, Unavailable, from_code
from workers.protocol.messages import UNLIMITED, Accepted, Bye, Cancel, Done, Failed, FromReplica, Heartbeat, Hello, RouterHeartbeat, Tokens

#: Codes with which a replica hands a row back unharmed: another one may take it.
BOUNCES = frozenset({"replica_lost", "overloaded", "unavailable", "not_found"})
#: A row that got on by more tokens than this at a replica did not end it where it may have ended the one before.
PROGRESS_TOKENS = 4
#: A Submit or Attach that was not answered for this long (seconds) is taken as lost, though the replica lives.
ACCEPT_S = 5.0


class RouterCore:
    """State of one router. ``greeting``: what it answers Hello with; its nonce is in every message. ``models``: every name and alias to the
    model it means."""

    def __init__(
        self,
        greeting: RouterHeartbeat,
        models: Mapping[str, str],
        admission: AdmissionSpec,
        fleet: ReplicaRegistry,
        *,
        accept_s: float = ACCEPT_S,
    ) -> None:
        self.boot, self._greeting, self.fleet = greeting.boot, greeting, fleet
        self._models, self._admission = dict(models), admission
        self._board = RequestTable(models.values())
        self._chooser = LeastWaitPolicy(self._board.lines)
        self._places = Transitions(self.boot, self._board, self._chooser, fleet, admission, accept_s)
        self.closing = False
        self.counts, self.tallies = self._board.counts, self._board.tallies

    # --- what doors do

    def submit(self, ask: RouterRequest, now: float, owner: object = None) -> int:
        """Accept a request and return its id; all that is delivered for it is addressed to ``owner``, else to the id.

        Raises NotFound, Overloaded (with ``retry_after``), Unavailable (closing), DeadlineExceeded.
        """
        model = self._models.get(ask.model)
        if model is None:
            raise NotFound(f"the model {ask.model[:64]!r} does not exist", code="model_not_found", param="model")
        if self.closing:
            raise Unavailable("the router is shutting down", "", "ask another router", retry_after=1.0)
        if ask.deadline_s is not None and ask.deadline_s <= 0:
            raise DeadlineExceeded("the request's deadline has passed", "it arrived with no time left")
        line = self._board.lines[model]
        free = 0 if line else sum(replica.free_rows for replica in self.fleet.serving(model))
        if len(line) + ask.n > self._admission.max_queue + free:
            self.counts["overloaded"] += 1
            raise Overloaded(
                f"{len(line)} requests wait for {model!r} already",
                "the queue is full",
                "retry later",
                retry_after=self._chooser.retry_after(model, len(line), now),
            )
        limit = self._admission.request_timeout_s or inf
        id = self._board.next()
        request = RequestState(id, owner or id, ask, model, now, now + min(limit, ask.deadline_s if ask.deadline_s is not None else inf))
        for choice in range(ask.n):
            params = ask.params if choice == 0 else msgspec.structs.replace(ask.params, seed=(ask.params.seed + choice) % 2**63)
            row = ChoiceState(request, self._board.next(), choice, params, ask.emitted[choice] if choice < len(ask.emitted) else [])
            request.rows.append(row)
            request.live += 1
        self._places.admit(request)
        self.counts["accepted"] += ask.n
        self._places.fill(model, now)
        return request.id

    def cancel(self, request: int, now: float) -> None:
        """The caller is gone. Unknown ids are ignored: the request ended by itself meanwhile."""
        record = self._board.requests.get(request)
        if record is not None:
            for row in record.rows:
                self._places.abandon(row)
            self._places.fill(record.model, now)

    def finish(self, request: int, choice: int, now: float) -> None:
        """The door ended this choice itself."""
        record = self._board.requests.get(request)
        if record is not None:
            self._places.stop(record.rows[choice], now)
            self._places.fill(record.model, now)

    def credit(self, request: int, tokens: int) -> None:
        """Grant ``tokens`` more to every live choice."""
        record = self._board.requests.get(request)
        if record is None:
            return
        for row in record.rows:
            if row.phase == "ended" or row.granted >= UNLIMITED:
                continue
            row.granted = min(UNLIMITED, row.granted + tokens)
            self._board.settle(row)
            if row.replica is not None:
                self._places.grant(row.replica, row.stream, tokens)

    def close(self) -> None:
        """Take nothing new; what runs goes on."""
        self.closing = True

    def abort(self, now: float) -> None:
        """End everything that is left: the router stops."""
        for request in list(self._board.requests.values()):
            for row in request.rows:
                if row.phase != "ended":
                    self._places.fail(
                        row, Unavailable("the router stopped", "its grace period is over", "retry at another router", retry_after=1.0)
                    )
        for replica in self.fleet.replicas.values():
            if replica.state != "lost":
                self._places.send(replica, Bye(boot=self.boot, reason="closing"))

    # --- what replicas say

    def hear(self, peer: bytes, user: str, message: FromReplica, now: float) -> None:
        """One message of a connection whose sender is authenticated as ``user``."""
        if isinstance(message, Hello):
            self._hello(peer, user, message, now)
            return
        if isinstance(message, Bye):
            leaver = self.fleet.at(peer)
            if leaver is not None and leaver.user == user:
                self._lose(leaver, "left", f"said goodbye: {message.reason}", now)
            return
        replica, moved = self.fleet.speaker(peer, user, message.boot)
        if replica is None:
            # RouterHeartbeat carries this router's nonce: a leader that has not greeted it says Hello.
            self.counts["unknown_speakers"] += 1
            if isinstance(message, Heartbeat):
                self._places.actions.append(SendMessage(peer, self._greeting))
            return
        replica.seen = now
        if moved:
            self._reattach(replica, now)
        if isinstance(message, Tokens):
            self._tokens(replica, message, now)
        elif isinstance(message, Heartbeat):
            self._heartbeat(replica, message, now)
        elif isinstance(message, Accepted):
            row = self._board.find(replica, message.stream, message.attempt)
            if row is not None and row.phase == "sent":
                row.phase = "accepted"
        elif isinstance(message, Done):
            self._done(replica, message, now)
        else:
            self._failed(replica, message, now)
        if replica.state == "ready":
            self._places.fill(replica.model, now)

    def unreachable(self, peer: bytes, now: float) -> None:
        """A send failed: the connection is gone or has taken nothing for a whole high-water mark."""
        replica = self.fleet.at(peer)
        if replica is not None:
            self._lose(replica, "unreachable", "unreachable", now)

    def tick(self, now: float) -> None:
        """Find what took too long; call every 50 to 200 ms."""
        for replica in self.fleet.silent(now):
            self._lose(replica, "silent", f"silent for {now - replica.seen:.1f} s", now)
        self.fleet.pardon(now)
        self.fleet.forget(now)
        self._places.expire(now)

    # --- what the shell asks

    def take(self) -> list[Action]:
        """Hand over what is to be done, in order."""
        actions, self._places.actions = self._places.actions, []
        return actions

    def resolve(self, name: str) -> str | None:
        """The model that a name or an alias means."""
        return self._models.get(name)

    def waiting(self, model: str) -> int:
        return len(self._board.lines[model])

    @property
    def models(self) -> Iterable[str]:
        return self._board.lines.keys()

    @property
    def live(self) -> int:
        """Requests not ended."""
        return len(self._board.requests)

    @property
    def placed(self) -> int:
        """Rows at replicas."""
        return len(self._board.streams)

    def check(self) -> None:
        """Assert that every live row is in exactly one place and that every index agrees."""
        self._board.check(self.fleet)

    # --- replicas

    def _hello(self, peer: bytes, user: str, hello: Hello, now: float) -> None:
        verdict = self.fleet.hello(peer, user, hello, now) if hello.model in self._board.lines else HelloRefused("model")
        if isinstance(verdict, HelloRefused):
            self.counts["refused_hellos"] += 1
            self._places.actions.append(SendMessage(peer, Bye(boot=self.boot, reason=verdict.reason)))
            return
        if verdict.replaced is not None:
            old = verdict.replaced
            if old.peer != peer and old.state != "lost":
                self._places.actions.append(SendMessage(old.peer, Bye(boot=self.boot, reason="stale")))
            self._lose(old, "replaced", "replaced by a newer process", now)
        self._places.actions.append(SendMessage(peer, self._greeting))
        if not verdict.fresh:
            self._reattach(verdict.replica, now)
        self._places.fill(hello.model, now)

    def _heartbeat(self, replica: Replica, heartbeat: Heartbeat, now: float) -> None:
        lost = self.fleet.judge(replica, heartbeat, now)
        if lost:
            self._lose(replica, "hung", lost, now)
            return
        accepted, waiting = 0, []
        for stream, tokens in replica.streams.items():
            row = self._board.streams[stream]
            if row.phase != "sent":
                accepted += not row.starved
                if tokens:
                    waiting.append(stream)
        replica.beat(heartbeat, accepted, waiting, now)

    def _lose(self, replica: Replica, loss: LossKind, reason: str, now: float) -> None:
        """Its rows go back to the front of the queue. The loss may be their doing, but where it ``left`` by itself."""
        if not self.fleet.lose(replica, reason, now):
            return
        self.counts["replicas_lost"] += 1
        # Still told to drop them: a replica that was only stopped or cut off works on.
        rows = [self._board.streams[stream] for stream in replica.streams]
        guilty = self._blame(rows) if loss != "left" else ()
        self.tallies[replica.model].losses[loss] += 1
        for row in rows:
            if row in guilty:
                error = ReplicaLost(
                    f"{row.deaths} replicas were lost while they ran this request",
                    reason,
                    "the request may be what ends them",
                    code="replica_limit",
                )
                self.tallies[replica.model].moves(row.trail, loss, now)
                self._places.fail(row, error)
            else:
                self._places.put_back(row, loss, now, cancel=True)
        self._places.fill(replica.model, now)

    def _blame(self, rows: list[ChoiceState]) -> list[ChoiceState]:
        """Count a death against those of ``rows`` that were accepted; returns the ones that must not end another replica.

        What ends a replica ends the next one at the same place, so a row that got on meanwhile starts over. Where some of those at the
        limit never gave a token, it is they: the others had run beside them or before them.
        """
        accepted = [row for row in rows if row.phase != "sent"]
        for row in accepted:
            row.deaths = 1 if len(row.emitted) - row.held > PROGRESS_TOKENS else row.deaths + 1
        suspects = [row for row in accepted if row.deaths >= self._admission.replica_limit]
        return [row for row in suspects if len(row.emitted) == row.base] or suspects

    def _reattach(self, replica: Replica, now: float) -> None:
        """Messages may have been lost with the old connection: ask for every row again from what is here."""
        for stream in list(replica.streams):
            self._places.attach(self._board.streams[stream], now)

    # --- streams

    def _tokens(self, replica: Replica, message: Tokens, now: float) -> None:
        for stream, prompt in message.prompt_logprobs or ():
            row = self._board.streams.get(stream)
            if row is not None and row.replica is replica and not row.scored:
                row.scored = True
                self._places.actions.append(DeliverPromptLogprobs(row.owner, row.choice, prompt))
        streams, logprobs = self._board.streams, message.logprobs
        attempts, firsts = message.attempts, message.firsts
        rows: list[Delivery] = []
        for i, (stream, tokens) in enumerate(zip(message.streams, message.tokens, strict=True)):
            row = streams.get(stream)
            if row is None or row.attempt != attempts[i] or row.replica is not replica:
                self._stale(replica, stream, len(tokens), row)
                continue
            if row.phase != "running":
                self._board.began(row, now)
            scores = logprobs[i] if logprobs is not None else None
            emitted = row.emitted
            have = len(emitted)
            skip = have - firsts[i]
            if skip:
                if skip < 0:
                    self._missed(row, now)
                    continue
                self.counts["duplicate_tokens"] += min(skip, len(tokens))
                tokens, scores = tokens[skip:], scores and scores[skip:]
            if tokens:
                emitted += tokens
                if row.granted <= len(emitted) - row.base:
                    self._board.settle(row)
                rows.append((row.owner, row.choice, have, tokens, scores))
        if rows:
            self._places.actions.append(DeliverTokens(rows))

    def _stale(self, replica: Replica, stream: int, tokens: int, row: ChoiceState | None) -> None:
        """Tokens of a placement that is over: its Cancel was lost, or is on its way."""
        self.counts["stale_tokens"] += tokens
        if row is None:
            self._places.send(replica, Cancel(boot=self.boot, stream=stream))

    def _missed(self, row: ChoiceState, now: float) -> None:
        self.counts["gaps"] += 1
        self._places.attach(row, now)

    def _done(self, replica: Replica, done: Done, now: float) -> None:
        row = self._board.find(replica, done.stream, done.attempt)
        if row is None:
            return
        if done.usage.output_tokens > len(row.emitted):
            self._short(row, done, now)
            return
        self._chooser.finished(row, replica, now, alone=len(self.fleet.replicas) == 1)
        self._places.finish(row, done.reason, done.usage, done.stop_id, now)

    def _short(self, row: ChoiceState, done: Done, now: float) -> None:
        """The end came, tokens before it did not. The row is over there, so it goes on from here elsewhere, once."""
        self.counts["gaps"] += 1
        if row.short:
            why = f"it counts {done.usage.output_tokens} tokens, {len(row.emitted)} arrived"
            self._places.fail(row, EngineFault("a replica ended the request before its last token", why, "retry"), cancel=False)
        else:
            row.short = True
            self._places.put_back(row, "short", now, cancel=False)

    def _failed(self, replica: Replica, failed: Failed, now: float) -> None:
        row = self._board.find(replica, failed.stream, failed.attempt)
        if row is None:
            return
        if failed.code in BOUNCES:
            # A replica that refuses is left alone until it says how it is; one that lost a row only forgot that row.
            replica.refusing |= failed.code != "not_found"
            self._places.put_back(row, "refused", now, cancel=False)
            return
        if failed.code == "nan_logits" and self.fleet.fault(replica, now):
            self.counts["quarantines"] += 1
        self._places.fail(row, from_code(failed.code, failed.message, retry_after=failed.retry_after), cancel=False)
