"""Streams of events: one write a turn for each, no task's turn for a token, and credit for what its reader takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.router.http import event_stream
from orchestrator.router.http.event_stream import WINDOW, EventStream, StreamWrites


class Request:
    """Stands for an InFlightRequest of one prompt."""

    def __init__(self) -> None:
        self.prepared = SimpleNamespace(requests=(SimpleNamespace(credit=WINDOW),))
        self.over, self.failed, self.usages = False, None, [[]]
        self.granted: list[int] = []
        self.turns = 0
        self._changed = asyncio.Event()

    def wake(self) -> None:
        self._changed.set()

    async def changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        self.turns += 1

    def credit(self, prompt: int, tokens: int) -> None:
        self.granted.append(tokens)

    def end(self) -> None:
        self.over = True
        self.wake()


class Connection:
    """Stands for an AnswerConnection."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.paused = self.aborted = self.broken = False
        self.on_writable: Any = None

    def write(self, part: bytes) -> None:
        assert not self.paused
        if self.broken:
            raise RuntimeError("broken")
        self.parts.append(part)

    def abort(self) -> None:
        self.aborted = True


ENDING = SimpleNamespace(last=lambda usages: b"last", broken=lambda error: b"broken")


class Answer:
    """One stream that has begun."""

    def __init__(self, writes: StreamWrites) -> None:
        self.request, self.connection, self.sent = Request(), Connection(), list[dict[str, Any]]()
        self.stream = EventStream(cast("Any", self.request), cast("Any", ENDING), cast("Any", self.connection), writes)
        self.task = asyncio.create_task(self.stream.run(self._send, []))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def begin(self) -> None:
        self.stream.push(b"first")
        await turns()
        assert [message["type"] for message in self.sent] == ["http.response.start"] and self.connection.parts == [b"first"]
        self.connection.parts.clear()
        self.request.turns = 0


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_events_of_a_turn_are_one_write_and_wake_no_task() -> None:
    async def main() -> None:
        one, other = (answers := [Answer(writes := StreamWrites()), Answer(writes)])
        for answer in answers:
            await answer.begin()
        one.stream.push(b"a")
        other.stream.push(b"x")
        one.stream.push(b"b")
        await turns()
        assert (one.connection.parts, other.connection.parts) == ([b"ab"], [b"x"]) and one.request.turns == 0
        one.stream.push(b"c")
        one.request.end()
        await one.task
        assert one.connection.parts == [b"ab"], "what comes with the end is sent with it"
        assert one.sent[1:] == [{"type": "http.response.body", "body": b"clast", "more_body": False}]
        other.request.end()
        await other.task

    asyncio.run(main())


def test_credit_is_for_what_the_reader_takes() -> None:
    async def main() -> None:
        answer = Answer(StreamWrites())
        await answer.begin()
        answer.stream.received(0, WINDOW // 2)
        await turns()
        assert answer.request.granted == [WINDOW // 2], "tokens without a text cause no write, and are paid for"
        answer.connection.paused = True
        answer.stream.received(0, WINDOW + 5)
        answer.stream.push(b"a")
        await turns()
        assert answer.connection.parts == [] and answer.request.granted == [WINDOW // 2]
        answer.stream.push(b"b")
        await turns()
        answer.connection.paused = False
        answer.connection.on_writable()
        assert answer.connection.parts == [b"ab"] and answer.request.granted == [WINDOW // 2, WINDOW // 2 + 5]
        answer.request.end()
        await answer.task
        assert answer.connection.on_writable is None

    asyncio.run(main())


def test_an_error_in_one_stream_is_not_felt_by_another() -> None:
    async def main() -> None:
        one, other = (answers := [Answer(writes := StreamWrites()), Answer(writes)])
        for answer in answers:
            await answer.begin()
        one.connection.broken = True
        for answer in answers:
            answer.stream.push(b"a")
        await turns()
        assert one.connection.aborted and not other.connection.aborted and other.connection.parts == [b"a"]
        for answer in answers:
            answer.request.end()
            await answer.task

    asyncio.run(main())


def test_a_reader_that_takes_nothing_is_dropped_and_one_that_takes_little_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "STALL_S", 0.2)

    async def main() -> None:
        stalled, slow = (answers := [Answer(writes := StreamWrites()), Answer(writes)])
        for answer in answers:
            await answer.begin()
            answer.connection.paused = True
            answer.stream.push(b"a")
        for _ in range(200):
            slow.connection.paused = False
            slow.connection.on_writable()
            slow.connection.paused = True
            slow.stream.push(b"a")
            await asyncio.sleep(0.01)
            if stalled.connection.aborted:
                break
        assert stalled.connection.aborted and not slow.connection.aborted
        for answer in answers:
            answer.request.end()
            await answer.task

    asyncio.run(main())
