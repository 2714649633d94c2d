"""The stream table of a leader: it maps each live sequence to the router and the stream of its tokens.

Owns one record for each sequence that the engine runs: its permanent name (client, request id), the stream (router's boot nonce, stream
number, attempt) of its tokens, the tokens that it emitted (so that another router can attach), its deadline; and the drain. Pure: it takes
events with the time and returns actions, which the leader carries out; must never touch a socket, a clock or an engine.

    (none) --submit--> starting (until the engine answers) --started--> streaming --router_lost--> orphan --attach--> streaming
    starting --refused--> (none)
    streaming --attach--> streaming, under the new stream; the old one is told Failed
    streaming, orphan --end of the sequence | deadline | cancel | drain | a newer attempt--> (none)
    orphan --orphan_s without attach--> (none)

The guarantee for every (router boot, stream, attempt) that was submitted or attached: tokens arrive in order without gap or repeat, then
exactly one Done or Failed, and nothing after it, unless the router itself was lost: then nothing more is sent. A router that starts again
has another boot nonce, so it counts as another router.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import NotFound, Overloaded, Rejected, TriremeError
from workers.protocol.messages import (
    MAX_FRAME,
    MAX_SCORED,
    UNLIMITED,
    Accepted,
    Attach,
    Cancel,
    Credit,
    Done,
    Failed,
    Logprobs,
    Submit,
    Tokens,
    Usage,
    error_text,
)

#: Maximum number of tokens in one message while an attached stream catches up.
CATCH_UP_TOKENS = 1024
#: Upper bounds of the msgpack encoding, bytes: one alternative (id, float) and one position without alternatives.
_TOP_BYTES, _POSITION_BYTES = 14, 32


class StartSequence(msgspec.Struct, frozen=True):
    """Submit the sequence to the engine; the leader answers with :meth:`StreamTable.started` or :meth:`StreamTable.refused`."""

    id: int
    submit: Submit


class StopSequence(msgspec.Struct, frozen=True):
    """Cancel the sequence in the engine."""

    id: int


class GrantCredit(msgspec.Struct, frozen=True):
    """Grant the sequence ``tokens`` more in the engine."""

    id: int
    tokens: int


class SendToRouter(msgspec.Struct, frozen=True):
    """Send ``message`` to the router with this boot nonce."""

    router_boot: str
    message: Accepted | Tokens | Done | Failed


class LogFault(msgspec.Struct, frozen=True):
    """Log that the engine could not continue a request. ``marks``: the caller's request id and trace id."""

    request_id: str
    marks: tuple[str, str]
    fault: Fault


Action: TypeAlias = StartSequence | StopSequence | GrantCredit | SendToRouter | LogFault


class BeginDrain(msgspec.Struct, frozen=True):
    """The launcher's order to a leader: accept no new requests; sequences that still run after ``grace_s`` seconds continue at another
    replica."""

    grace_s: float


class _StreamRecord(msgspec.Struct, kw_only=True):
    """One live sequence. ``tokens``: the tokens that came with Submit and those emitted since; ``logprobs``: those of the last
    len(``logprobs``) tokens. ``router_boot``: empty while the sequence is an orphan. ``credit``: tokens that may still be sent.
    ``cached_tokens``: prompt tokens found in the prefix cache, if the engine has reported them."""

    id: int
    name: tuple[str, str]
    router_boot: str
    stream: int
    attempt: int
    seed: int
    prompt_tokens: int
    tokens: list[int]
    credit: int
    deadline: float | None
    marks: tuple[str, str]
    orphaned_until: float = 0.0
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] | None = None
    cached_tokens: int = 0


class _TokensBuilder:
    """Collects the columns of one Tokens message."""

    __slots__ = ("attempts", "cached", "firsts", "logprobs", "scored", "streams", "tokens")

    def __init__(self) -> None:
        self.cached: list[tuple[int, int]] = []
        self.streams: list[int] = []
        self.attempts: list[int] = []
        self.firsts: list[int] = []
        self.tokens: list[list[int]] = []
        self.logprobs: list[list[Logprobs] | None] = []
        self.scored = False

    def add(self, record: _StreamRecord, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        self.streams.append(record.stream)
        self.attempts.append(record.attempt)
        self.firsts.append(first)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        self.scored |= logprobs is not None

    def message(self, boot: str) -> Tokens:
        return Tokens(
            boot=boot, streams=self.streams, attempts=self.attempts, firsts=self.firsts, tokens=self.tokens,
            logprobs=self.logprobs if self.scored else None, cached=self.cached or None,
        )  # fmt: skip


class StreamTable:
    """The table of one leader. Times are seconds of one monotonic clock.

    Args:
        boot: this process's nonce, put into every message. model: the only model name that Submit may contain. orphan_s: how long a
        sequence whose router was lost waits for another router to attach. limit: maximum number of live sequences; further ones are refused
        as overloaded.
    """

    def __init__(self, *, boot: str, model: str, orphan_s: float = 1.0, limit: int = 4096) -> None:
        self._boot, self._model, self._orphan_s, self._limit = boot, model, orphan_s, limit
        self._by_id: dict[int, _StreamRecord] = {}
        self._by_name: dict[tuple[str, str], _StreamRecord] = {}
        self._by_stream: dict[tuple[str, int], _StreamRecord] = {}
        self._due: list[tuple[float, int]] = []
        self._drain_until: float | None = None
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    def live(self) -> list[tuple[str, str]]:
        """Names of the live sequences."""
        return list(self._by_name)

    # events from routers

    def submit(self, message: Submit, now: float) -> list[Action]:
        """Start a sequence; ``now`` is the time of receipt, from which the deadline counts."""
        name = (message.client, message.request_id)
        known = self._by_name.get(name)
        if known is not None:
            if (known.router_boot, known.stream, known.attempt) == (message.boot, message.stream, message.attempt):
                return [self._accepted(known)]
            if message.attempt < known.attempt:
                return [self._failed_message(message, _superseded(known.attempt))]
        try:
            self._check_submit(message, replaces=known is not None)
        except TriremeError as error:
            return [self._failed_message(message, error)]
        actions = self._stop(known, _superseded(message.attempt)) if known is not None else []
        displaced = self._by_stream.get((message.boot, message.stream))
        if displaced is not None:
            actions += self._stop(displaced, _superseded(message.attempt))
        self._next_id += 1
        record = _StreamRecord(
            id=self._next_id, name=name, router_boot=message.boot, stream=message.stream, attempt=message.attempt,
            seed=message.task.params.seed, prompt_tokens=len(message.prompt_ids), tokens=list(message.task.emitted),
            credit=message.task.credit, deadline=None if message.deadline_ms is None else now + message.deadline_ms / 1000.0,
            marks=message.marks,
        )  # fmt: skip
        self._by_id[record.id] = self._by_name[name] = self._by_stream[record.router_boot, record.stream] = record
        if record.deadline is not None:
            heapq.heappush(self._due, (record.deadline, record.id))
        return [*actions, StartSequence(record.id, message)]

    def started(self, id: int) -> list[Action]:
        """The engine accepted the sequence."""
        return [self._accepted(self._by_id[id])]

    def refused(self, id: int, error: TriremeError) -> list[Action]:
        """The engine refused the sequence and keeps nothing of it."""
        record = self._by_id[id]
        self._drop(record)
        return [self._failed_message(record, error)]

    def attach(self, message: Attach) -> list[Action]:
        """Move a live sequence to another stream and send its tokens from ``have`` on. After the error ``not_found`` the router submits
        instead."""
        record = self._by_name.get((message.client, message.request_id))
        if record is None or not 0 <= message.have <= len(record.tokens):
            error = TriremeError("no such sequence here, or one that has not come so far", code="not_found")
            return [self._failed_message(message, error)]
        if message.attempt < record.attempt:
            return [self._failed_message(message, _superseded(record.attempt))]
        actions: list[Action] = []
        displaced = self._by_stream.get((message.boot, message.stream))
        if displaced is not None and displaced is not record:
            actions += self._stop(displaced, _superseded(message.attempt))
        if record.router_boot:
            del self._by_stream[record.router_boot, record.stream]
            if (record.router_boot, record.stream, record.attempt) != (message.boot, message.stream, message.attempt):
                actions.append(self._failed_message(record, _superseded(message.attempt)))
        record.router_boot, record.stream, record.attempt = message.boot, message.stream, message.attempt
        self._by_stream[record.router_boot, record.stream] = record
        actions.append(self._accepted(record))
        actions += self._catch_up(record, message.have)
        # Credit cannot be revoked from an engine: the credit of an earlier router remains.
        granted = message.credit - (len(record.tokens) - message.have)
        if granted > record.credit:
            actions.append(GrantCredit(record.id, granted - record.credit))
            record.credit = granted
        return actions

    def cancel(self, message: Cancel) -> list[Action]:
        record = self._by_stream.get((message.boot, message.stream))
        if record is None or message.attempt < record.attempt:
            return []
        self._drop(record)
        return [
            StopSequence(record.id),
            self._done(record, Finish("cancelled", Usage(prompt_tokens=record.prompt_tokens, output_tokens=len(record.tokens)))),
        ]

    def credit(self, message: Credit) -> list[Action]:
        actions: list[Action] = []
        for stream, tokens in zip(message.streams, message.tokens, strict=False):
            record = self._by_stream.get((message.boot, stream))
            granted = 0 if record is None else min(tokens, UNLIMITED - record.credit)
            if record is not None and granted > 0:
                record.credit += granted
                actions.append(GrantCredit(record.id, granted))
        return actions

    def router_lost(self, router_boot: str, now: float) -> None:
        """A router is lost: its sequences become orphans, and are cancelled if no router attaches in time."""
        for record in self._by_id.values():
            if record.router_boot == router_boot:
                del self._by_stream[record.router_boot, record.stream]
                record.router_boot, record.orphaned_until = "", now + self._orphan_s
                heapq.heappush(self._due, (record.orphaned_until, record.id))

    # events from the engine and the clock

    def emitted(self, emissions: Iterable[Emission]) -> list[Action]:
        """Send the output of one step: one Tokens message to each router, then the terminal messages."""
        builders: dict[str, _TokensBuilder] = {}
        prompts: list[Action] = []
        ends: list[Action] = []
        for emission in emissions:
            record = self._by_id.get(emission.id)
            if record is None:  # cancelled while the step ran
                continue
            if emission.tokens and emission.first != len(record.tokens):
                why = f"the engine emitted position {emission.first} after {len(record.tokens)} tokens"
                ends += self._stop(record, TriremeError(why, code="engine_fault"))
                continue
            if emission.prompt_logprobs is not None:
                if len(emission.prompt_logprobs) > MAX_SCORED or _prompt_bytes(emission.prompt_logprobs) > MAX_FRAME:
                    why = "the prompt's logprobs do not fit one message: send a shorter prompt, or ask for fewer alternatives"
                    ends += self._stop(record, TriremeError(why, code="invalid_request"))
                    continue
                record.prompt_logprobs = emission.prompt_logprobs
                prompts += self._prompt(record)
            record.tokens += emission.tokens
            record.credit -= len(emission.tokens)
            if emission.logprobs is not None:
                record.logprobs += emission.logprobs
            record.cached_tokens = record.cached_tokens or emission.cached_tokens
            if emission.tokens and record.router_boot:
                builder = builders.get(record.router_boot)
                if builder is None:
                    builder = builders[record.router_boot] = _TokensBuilder()
                builder.add(record, emission.first, emission.tokens, emission.logprobs)
                if emission.cached_tokens:
                    builder.cached.append((record.stream, emission.cached_tokens))
            if emission.end is not None:
                ends += self._end(record, emission.end)
        sends = [SendToRouter(router_boot, builder.message(self._boot)) for router_boot, builder in builders.items()]
        return [*prompts, *sends, *ends]

    def drain(self, now: float, grace_s: float) -> None:
        """Refuse new sequences, and end those that still run after ``grace_s`` seconds; with two drains, the earlier end counts."""
        until = now + grace_s
        self._drain_until = until if self._drain_until is None else min(until, self._drain_until)

    def expire(self, now: float) -> list[Action]:
        """Act on all due times: deadlines, waits of orphans, the end of the drain."""
        actions: list[Action] = []
        while self._due and self._due[0][0] <= now:
            record = self._by_id.get(heapq.heappop(self._due)[1])
            if record is None:
                continue
            if record.deadline is not None and record.deadline <= now:
                actions += self._stop(record, TriremeError("the request's deadline passed", code="deadline_exceeded"))
            elif not record.router_boot and record.orphaned_until <= now:
                self._drop(record)
                actions.append(StopSequence(record.id))
        if self._drain_until is not None and self._drain_until <= now:
            for record in list(self._by_id.values()):
                actions += self._stop(record, TriremeError("the replica has drained: continue elsewhere", code="replica_lost"))
        return actions

    def next_due(self) -> float | None:
        """The earliest time at which :meth:`expire` may have something to do; None = never."""
        while self._due and self._due[0][1] not in self._by_id:
            heapq.heappop(self._due)
        times = [self._due[0][0]] if self._due else []
        if self._drain_until is not None and self._by_id:
            times.append(self._drain_until)
        return min(times, default=None)

    def check(self) -> None:
        """Raises AssertionError if the tables are inconsistent."""
        assert self._by_name == {record.name: record for record in self._by_id.values()}
        assert self._by_stream == {(record.router_boot, record.stream): record for record in self._by_id.values() if record.router_boot}
        timed = {id for _, id in self._due}
        assert all(record.id in timed for record in self._by_id.values() if record.deadline is not None or not record.router_boot)
        assert all(len(record.logprobs) <= len(record.tokens) for record in self._by_id.values())

    def _check_submit(self, message: Submit, *, replaces: bool) -> None:
        """Raise the error for a Submit that is refused before the engine checks its ids, sizes and grammar."""
        if message.model != self._model:
            raise NotFound(f"this replica serves {self._model!r}", code="model_not_found")
        if self.draining:
            raise Overloaded("the replica is draining")
        if len(self._by_id) >= self._limit and not replaces:
            raise Overloaded(f"the replica holds {self._limit} sequences", retry_after=1.0)
        params = message.task.params
        if not 0 <= params.seed < 2**63:
            raise Rejected("the seed is outside 0..2**63-1")
        if not 0 <= params.max_tokens <= UNLIMITED or not 0 <= message.task.credit <= UNLIMITED or message.attempt < 0:
            raise Rejected("max_tokens, credit or attempt is out of range")

    def _stop(self, record: _StreamRecord, error: TriremeError) -> list[Action]:
        """End a sequence that the engine still runs."""
        self._drop(record)
        stop: list[Action] = [StopSequence(record.id)]
        return [*stop, self._failed_message(record, error)] if record.router_boot else stop

    def _end(self, record: _StreamRecord, end: Finish | Fault) -> list[Action]:
        """End a sequence that the engine has ended."""
        self._drop(record)
        if isinstance(end, Finish):
            return [self._done(record, end)] if record.router_boot else []
        logged: list[Action] = [LogFault(record.name[1], record.marks, end)]
        return [*logged, self._failed_message(record, TriremeError(end.message, code=end.code))] if record.router_boot else logged

    def _drop(self, record: _StreamRecord) -> None:
        del self._by_id[record.id], self._by_name[record.name]
        if record.router_boot:
            del self._by_stream[record.router_boot, record.stream]

    def _catch_up(self, record: _StreamRecord, have: int) -> list[Action]:
        actions = self._prompt(record) if have == 0 and record.prompt_logprobs is not None else []
        if record.cached_tokens:
            told = _TokensBuilder()
            told.cached.append((record.stream, record.cached_tokens))
            actions.append(SendToRouter(record.router_boot, told.message(self._boot)))
        scored_from = len(record.tokens) - len(record.logprobs)
        first = have
        while first < len(record.tokens):
            stop = min(first + CATCH_UP_TOKENS, len(record.tokens))
            if first < scored_from:  # tokens of an earlier attempt: their logprobs were already sent
                stop = min(stop, scored_from)
            builder = _TokensBuilder()
            builder.add(
                record,
                first,
                record.tokens[first:stop],
                record.logprobs[first - scored_from : stop - scored_from] if first >= scored_from else None,
            )
            actions.append(SendToRouter(record.router_boot, builder.message(self._boot)))
            first = stop
        return actions

    def _prompt(self, record: _StreamRecord) -> list[Action]:
        if not record.router_boot or record.prompt_logprobs is None:
            return []
        message = Tokens(
            boot=self._boot, streams=[], attempts=[], firsts=[], tokens=[], prompt_logprobs=[(record.stream, record.prompt_logprobs)]
        )
        return [SendToRouter(record.router_boot, message)]

    def _accepted(self, record: _StreamRecord) -> SendToRouter:
        message = Accepted(
            boot=self._boot, stream=record.stream, attempt=record.attempt, seed=record.seed, prompt_tokens=record.prompt_tokens
        )
        return SendToRouter(record.router_boot, message)

    def _done(self, record: _StreamRecord, end: Finish) -> SendToRouter:
        message = Done(
            boot=self._boot, stream=record.stream, attempt=record.attempt, reason=end.reason, usage=end.usage, stop_id=end.stop_id
        )
        return SendToRouter(record.router_boot, message)

    def _failed_message(self, to: _StreamRecord | Submit | Attach, error: TriremeError) -> SendToRouter:
        message = Failed(
            boot=self._boot,
            stream=to.stream,
            attempt=to.attempt,
            code=error.code,
            message=error_text(error),
            retry_after=error.retry_after,
            param=error.param,
        )
        return SendToRouter(to.router_boot if isinstance(to, _StreamRecord) else to.boot, message)


def _superseded(attempt: int) -> TriremeError:
    return TriremeError(f"superseded by attempt {attempt}", code="cancelled")


def _prompt_bytes(logprobs: list[Logprobs]) -> int:
    """Upper bound of the size of ``logprobs`` in a message."""
    return sum(_POSITION_BYTES + _TOP_BYTES * len(position.top_ids) for position in logprobs)
