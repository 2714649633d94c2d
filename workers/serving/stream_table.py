"""Sessions: which router's stream each live row of a replica answers to, and what that router is told.

Owns the table of live rows: their lasting names (client, request), the (route, stream, attempt) that they are sent under, the tokens that
they emitted (so that another router can attach), deadlines, and the drain. A *route* is a router's boot nonce: a restarted router is
another route. Pure: events come in with the time, actions go out, and the leader acts; must never touch a socket, a clock or an engine.

What holds for every (route, stream, attempt) that was submitted or attached: tokens arrive in order without gap or repeat, then exactly one
Done or Failed, and nothing after it, unless the route itself was lost, after which nothing is sent.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import NotFound, Overloaded, Rejected, TriremeError
from workers.protocol.messages import MAX_FRAME, UNLIMITED, Accepted, Attach, Cancel, Credit, Done, Failed, Logprobs, Submit, Tokens, Usage

#: Tokens of one row in one message when an attached stream catches up.
CATCH_UP_TOKENS = 1024
#: Faults that are kept until somebody asks.
MAX_FAULTS = 64
#: Upper bounds of the msgpack encoding, bytes: one alternative (id, float) and one position without alternatives.
_TOP_BYTES, _POSITION_BYTES = 14, 32


class StartSequence(msgspec.Struct, frozen=True):
    """Submit the row to the engine; the leader answers with :meth:`StreamTable.started` or :meth:`StreamTable.refused`."""

    id: int
    request: Submit


class StopSequence(msgspec.Struct, frozen=True):
    """Cancel the row in the engine."""

    id: int


class GrantCredit(msgspec.Struct, frozen=True):
    """Credit the row in the engine."""

    id: int
    tokens: int


class SendToRouter(msgspec.Struct, frozen=True):
    """Send ``message`` to the router whose boot nonce is ``route``."""

    route: str
    message: Accepted | Tokens | Done | Failed


class BeginDrain(msgspec.Struct, frozen=True):
    """The launcher's order to a leader: accept nothing new; what still runs after ``grace_s`` seconds continues at another replica."""

    grace_s: float


Action: TypeAlias = StartSequence | StopSequence | GrantCredit | SendToRouter


class _StreamRecord(msgspec.Struct, kw_only=True):
    """``tokens`` holds the journal that came with Submit and what was emitted since; ``logprobs`` those of ``tokens[-len(logprobs):]``.

    ``route`` is empty while the row is an orphan. ``credit``: tokens that the route may still receive.
    """

    id: int
    name: tuple[str, str]
    route: str
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


class _Outgoing:
    """The columns of one Tokens message."""

    __slots__ = ("attempts", "firsts", "logprobs", "scored", "streams", "tokens")

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.attempts: list[int] = []
        self.firsts: list[int] = []
        self.tokens: list[list[int]] = []
        self.logprobs: list[list[Logprobs] | None] = []
        self.scored = False

    def add(self, row: _StreamRecord, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        self.streams.append(row.stream)
        self.attempts.append(row.attempt)
        self.firsts.append(first)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        self.scored |= logprobs is not None

    def message(self, boot: str) -> Tokens:
        logprobs = self.logprobs if self.scored else None
        return Tokens(boot=boot, streams=self.streams, attempts=self.attempts, firsts=self.firsts, tokens=self.tokens, logprobs=logprobs)


class StreamTable:
    """The table. Times are seconds of one monotonic clock.

    Args:
        boot: this process's own nonce, put into every message.
        model: the only model name that Submit may carry.
        orphan_s: how long a row whose router was lost waits for another router to attach.
        limit: most live rows; more are refused as overloaded.
    """

    def __init__(self, *, boot: str, model: str, orphan_s: float = 1.0, limit: int = 4096) -> None:
        self._boot, self._model, self._orphan_s, self._limit = boot, model, orphan_s, limit
        self._rows: dict[int, _StreamRecord] = {}
        self._names: dict[tuple[str, str], _StreamRecord] = {}
        self._streams: dict[tuple[str, int], _StreamRecord] = {}
        self._due: list[tuple[float, int]] = []
        self._drain_until: float | None = None
        self._next_id = 0
        #: The last rows that the engine could not go on with: (request, the caller's marks, why). Whoever tells people takes them out.
        self.faults: deque[tuple[str, tuple[str, str], Fault]] = deque(maxlen=MAX_FAULTS)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    def live(self) -> list[tuple[str, str]]:
        """Names of the live rows."""
        return list(self._names)

    # events from routers

    def submit(self, message: Submit, now: float) -> list[Action]:
        """Place a row; ``now`` is the time of receipt, from which the deadline counts."""
        name = (message.client, message.request_id)
        known = self._names.get(name)
        if known is not None:
            if (known.route, known.stream, known.attempt) == (message.boot, message.stream, message.attempt):
                return [self._accepted(known)]
            if message.attempt < known.attempt:
                return [self._failed(message, "cancelled", f"superseded by attempt {known.attempt}")]
        try:
            self._check(message, replaces=known is not None)
        except TriremeError as error:
            return [self._refusal(message, error)]
        actions = self._supersede(known, message) if known is not None else []
        holder = self._streams.get((message.boot, message.stream))
        if holder is not None:
            actions += self._supersede(holder, message)
        self._next_id += 1
        row = _StreamRecord(
            id=self._next_id, name=name, route=message.boot, stream=message.stream, attempt=message.attempt, seed=message.task.params.seed,
            prompt_tokens=len(message.prompt_ids), tokens=list(message.task.emitted), credit=message.task.credit,
            deadline=None if message.deadline_ms is None else now + message.deadline_ms / 1000.0, marks=message.marks,
        )  # fmt: skip
        self._rows[row.id] = self._names[name] = self._streams[row.route, row.stream] = row
        if row.deadline is not None:
            heapq.heappush(self._due, (row.deadline, row.id))
        return [*actions, StartSequence(row.id, message)]

    def started(self, id: int) -> list[Action]:
        """The engine took the row."""
        return [self._accepted(self._rows[id])]

    def refused(self, id: int, error: TriremeError) -> list[Action]:
        """The engine raised on the row and holds nothing of it."""
        row = self._rows[id]
        self._drop(row)
        return [self._refusal(row, error)]

    def attach(self, message: Attach) -> list[Action]:
        """Move a live row to another stream and catch it up from ``have``. ``not_found`` tells the router to submit instead."""
        row = self._names.get((message.client, message.request_id))
        if row is None or not 0 <= message.have <= len(row.tokens):
            return [self._failed(message, "not_found", "no such row here, or one that has not come so far")]
        if message.attempt < row.attempt:
            return [self._failed(message, "cancelled", f"superseded by attempt {row.attempt}")]
        actions: list[Action] = []
        holder = self._streams.get((message.boot, message.stream))
        if holder is not None and holder is not row:
            actions += self._supersede(holder, message)
        if row.route:
            del self._streams[row.route, row.stream]
            if (row.route, row.stream, row.attempt) != (message.boot, message.stream, message.attempt):
                actions.append(self._failed(row, "cancelled", f"superseded by attempt {message.attempt}"))
        row.route, row.stream, row.attempt = message.boot, message.stream, message.attempt
        self._streams[row.route, row.stream] = row
        actions.append(self._accepted(row))
        actions += self._catch_up(row, message.have)
        # Credit cannot be taken back from an engine: what an earlier route granted stays granted.
        granted = message.credit - (len(row.tokens) - message.have)
        if granted > row.credit:
            actions.append(GrantCredit(row.id, granted - row.credit))
            row.credit = granted
        return actions

    def cancel(self, message: Cancel) -> list[Action]:
        row = self._streams.get((message.boot, message.stream))
        if row is None or message.attempt < row.attempt:
            return []
        self._drop(row)
        return [
            StopSequence(row.id),
            self._done(row, Finish("cancelled", Usage(prompt_tokens=row.prompt_tokens, output_tokens=len(row.tokens)))),
        ]

    def credit(self, message: Credit) -> list[Action]:
        actions: list[Action] = []
        for stream, tokens in zip(message.streams, message.tokens, strict=False):
            row = self._streams.get((message.boot, stream))
            granted = 0 if row is None else min(tokens, UNLIMITED - row.credit)
            if row is not None and granted > 0:
                row.credit += granted
                actions.append(GrantCredit(row.id, granted))
        return actions

    def lost(self, route: str, now: float) -> None:
        """A router is gone: its rows are orphans, cancelled when nobody attaches in time."""
        for row in self._rows.values():
            if row.route == route:
                del self._streams[row.route, row.stream]
                row.route, row.orphaned_until = "", now + self._orphan_s
                heapq.heappush(self._due, (row.orphaned_until, row.id))

    # events from the engine and the clock

    def emitted(self, emissions: Iterable[Emission]) -> list[Action]:
        """What one step did: one Tokens message a route, then the terminal messages."""
        outgoing: dict[str, _Outgoing] = {}
        prompts: list[Action] = []
        ends: list[Action] = []
        for emission in emissions:
            row = self._rows.get(emission.id)
            if row is None:  # cancelled while the step ran
                continue
            if emission.tokens and emission.first != len(row.tokens):
                ends += self._fault(row, "engine_fault", f"the engine emitted position {emission.first} after {len(row.tokens)} tokens")
                continue
            if emission.prompt_logprobs is not None:
                if _prompt_bytes(emission.prompt_logprobs) > MAX_FRAME:
                    ends += self._fault(row, "invalid_request", "the prompt's logprobs do not fit one message: ask for fewer alternatives")
                    continue
                row.prompt_logprobs = emission.prompt_logprobs
                prompts += self._prompt(row)
            row.tokens += emission.tokens
            row.credit -= len(emission.tokens)
            if emission.logprobs is not None:
                row.logprobs += emission.logprobs
            if emission.tokens and row.route:
                out = outgoing.get(row.route)
                if out is None:
                    out = outgoing[row.route] = _Outgoing()
                out.add(row, emission.first, emission.tokens, emission.logprobs)
            if emission.end is not None:
                ends += self._end(row, emission.end)
        sends = [SendToRouter(route, out.message(self._boot)) for route, out in outgoing.items()]
        return [*prompts, *sends, *ends]

    def drain(self, now: float, grace_s: float) -> None:
        """Refuse what is new, and cut what still runs after ``grace_s``; of two drains the earlier end counts."""
        until = now + grace_s
        self._drain_until = until if self._drain_until is None else min(until, self._drain_until)

    def expire(self, now: float) -> list[Action]:
        """Act on every time that has passed: deadlines, orphans, the end of the drain."""
        actions: list[Action] = []
        while self._due and self._due[0][0] <= now:
            row = self._rows.get(heapq.heappop(self._due)[1])
            if row is None:
                continue
            if row.deadline is not None and row.deadline <= now:
                actions += self._fault(row, "deadline_exceeded", "the request's deadline passed")
            elif not row.route and row.orphaned_until <= now:
                self._drop(row)
                actions.append(StopSequence(row.id))
        if self._drain_until is not None and self._drain_until <= now:
            for row in list(self._rows.values()):
                actions += self._fault(row, "replica_lost", "the replica has drained: continue elsewhere")
        return actions

    def next_due(self) -> float | None:
        """The earliest time at which :meth:`expire` may have something to do; None = never."""
        while self._due and self._due[0][1] not in self._rows:
            heapq.heappop(self._due)
        times = [self._due[0][0]] if self._due else []
        if self._drain_until is not None and self._rows:
            times.append(self._drain_until)
        return min(times, default=None)

    def check(self) -> None:
        """Raises AssertionError when the tables disagree."""
        assert self._names == {row.name: row for row in self._rows.values()}
        assert self._streams == {(row.route, row.stream): row for row in self._rows.values() if row.route}
        timed = {id for _, id in self._due}
        assert all(row.id in timed for row in self._rows.values() if row.deadline is not None or not row.route)
        assert all(len(row.logprobs) <= len(row.tokens) for row in self._rows.values())

    def _check(self, message: Submit, *, replaces: bool) -> None:
        """Raises what Submit is refused with, before the engine looks at ids, sizes and grammar."""
        if message.model != self._model:
            raise NotFound(f"this replica serves {self._model!r}", code="model_not_found")
        if self.draining:
            raise Overloaded("the replica is draining")
        if len(self._rows) >= self._limit and not replaces:
            raise Overloaded(f"the replica holds {self._limit} rows", retry_after=1.0)
        params = message.task.params
        if not 0 <= params.seed < 2**63:
            raise Rejected("the seed is outside 0..2**63-1")
        if not 1 <= params.max_tokens <= UNLIMITED or not 0 <= message.task.credit <= UNLIMITED or message.attempt < 0:
            raise Rejected("max_tokens, credit or attempt is out of range")

    def _supersede(self, row: _StreamRecord, by: Submit | Attach) -> list[Action]:
        return self._fault(row, "cancelled", f"superseded by attempt {by.attempt}")

    def _fault(self, row: _StreamRecord, code: str, message: str) -> list[Action]:
        """End a row that the engine still holds."""
        self._drop(row)
        stop: list[Action] = [StopSequence(row.id)]
        return [*stop, self._failed(row, code, message)] if row.route else stop

    def _end(self, row: _StreamRecord, end: Finish | Fault) -> list[Action]:
        """End a row that the engine has ended."""
        self._drop(row)
        if isinstance(end, Fault):
            self.faults.append((row.name[1], row.marks, end))
        if not row.route:
            return []
        if isinstance(end, Fault):
            return [self._failed(row, end.code, end.message)]
        return [self._done(row, end)]

    def _drop(self, row: _StreamRecord) -> None:
        del self._rows[row.id], self._names[row.name]
        if row.route:
            del self._streams[row.route, row.stream]

    def _catch_up(self, row: _StreamRecord, have: int) -> list[Action]:
        actions = self._prompt(row) if have == 0 and row.prompt_logprobs is not None else []
        scored_from = len(row.tokens) - len(row.logprobs)
        first = have
        while first < len(row.tokens):
            stop = min(first + CATCH_UP_TOKENS, len(row.tokens))
            if first < scored_from:  # tokens of an earlier attempt: their logprobs went to whoever has that attempt's journal
                stop = min(stop, scored_from)
            out = _Outgoing()
            out.add(
                row, first, row.tokens[first:stop], row.logprobs[first - scored_from : stop - scored_from] if first >= scored_from else None
            )
            actions.append(SendToRouter(row.route, out.message(self._boot)))
            first = stop
        return actions

    def _prompt(self, row: _StreamRecord) -> list[Action]:
        if not row.route or row.prompt_logprobs is None:
            return []
        message = Tokens(
            boot=self._boot, streams=[], attempts=[], firsts=[], tokens=[], prompt_logprobs=[(row.stream, row.prompt_logprobs)]
        )
        return [SendToRouter(row.route, message)]

    def _accepted(self, row: _StreamRecord) -> SendToRouter:
        return SendToRouter(
            row.route, Accepted(boot=self._boot, stream=row.stream, attempt=row.attempt, seed=row.seed, prompt_tokens=row.prompt_tokens)
        )

    def _done(self, row: _StreamRecord, end: Finish) -> SendToRouter:
        message = Done(boot=self._boot, stream=row.stream, attempt=row.attempt, reason=end.reason, usage=end.usage, stop_id=end.stop_id)
        return SendToRouter(row.route, message)

    def _failed(self, to: _StreamRecord | Submit | Attach, code: str, why: str) -> SendToRouter:
        return self._refusal(to, TriremeError(why, code=code))

    def _refusal(self, to: _StreamRecord | Submit | Attach, error: TriremeError) -> SendToRouter:
        message = Failed(
            boot=self._boot,
            stream=to.stream,
            attempt=to.attempt,
            code=error.code,
            message=str(error),
            retry_after=error.retry_after,
            param=error.param,
        )
        return SendToRouter(to.route if isinstance(to, _StreamRecord) else to.boot, message)


def _prompt_bytes(logprobs: list[Logprobs]) -> int:
    """Upper bound of their size in a message."""
    return sum(_POSITION_BYTES + _TOP_BYTES * len(position.top_ids) for position in logprobs)
