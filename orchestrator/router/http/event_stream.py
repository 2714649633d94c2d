"""The body of a streamed response: server-sent events, written straight to the connection.

The bytes of an event are made by the dialect's sinks (:mod:`orchestrator.router.http.dialects.openai.sinks` and ``wording``,
:mod:`orchestrator.router.http.dialects.kserve.api`), with :func:`event` where JSON is encoded whole. This module joins and sends them.
Owns the events that are not sent yet and the credit that bounds them: when the reader stops, the generation stops, and the router keeps at
most ``credit`` tokens per prompt. Nothing is sent before the first event, so an error until then still has its own HTTP status; a later
error is an event, and the stream ends after it.

A task is woken for the head, and for the last part; between them a token wakes no task. Streams that have something to send are noted in
:class:`StreamWrites`, which writes all of them in one callback, after the messages of a step were read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from orchestrator.router.frontend.schema import Body
from orchestrator.router.http.in_flight import InFlightRequest
from orchestrator.router.http.protocol import AnswerConnection
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Usage

#: Tokens in flight to one reader (fewer with logprobs, which are longer): at 200 bytes and 2 KB a token, some 50 and 130 KB.
WINDOW, WINDOW_LOGPROBS = 256, 64
#: Seconds between two checks of a part that waits for its reader; the connection is dropped at the second check that finds the same one.
STALL_S = 15.0

log = logging.getLogger("trireme.http")

encode = msgspec.json.Encoder().encode


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event that holds ``body`` as JSON."""
    return b"data: %b\n\n" % encode(body)


def window(body: Body) -> int:
    """Credit of a streamed request, tokens."""
    return WINDOW if body.num_logprobs is None else WINDOW_LOGPROBS


class StreamEnding(Protocol):
    """How a dialect ends a stream."""

    def last(self, usages: Sequence[Sequence[Usage]]) -> bytes:
        """What follows the last event of a complete answer. ``usages``: of the choices of each prompt."""

    def broken(self, error: TriremeError) -> bytes:
        """The event that ends an answer after an error."""


class StreamWrites:
    """The streams of one router that have something to send in this turn of the event loop."""

    def __init__(self) -> None:
        self._due: list[EventStream] = []

    def add(self, stream: EventStream) -> None:
        """Call its :meth:`EventStream.write` at the end of this turn."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._write)
        self._due.append(stream)

    def _write(self) -> None:
        due, self._due = self._due, []
        for stream in due:
            try:
                stream.write()
            except Exception:
                # The edge of an answer: an error in one ends that one alone.
                log.exception("an answer could not be written")
                stream.abort()


class EventStream:
    """Joins the events of a turn into one write, and grants credit for what was written."""

    def __init__(self, request: InFlightRequest, ending: StreamEnding, connection: AnswerConnection, writes: StreamWrites) -> None:
        self._request, self._ending, self._connection, self._writes = request, ending, connection, writes
        self._chunks: list[bytes] = []
        prompts = request.prepared.requests
        self._window = prompts[0].credit
        self._received = [0] * len(prompts)
        self._granted = [0] * len(prompts)
        #: It is among the writes of this turn; its head has been sent.
        self._due = self._begun = False
        #: Parts that were written or had to wait, and whether one waits for the reader now.
        self._parts = 0
        self._waiting = False
        self._timer: asyncio.TimerHandle | None = None

    def push(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        if not self._due:
            self._due = True
            self._writes.add(self)

    def received(self, prompt: int, position: int) -> None:
        """Count the output tokens of a prompt. Credit goes to all its choices alike, so the furthest choice counts."""
        if position > self._received[prompt]:
            self._received[prompt] = position
            # Tokens without a text cause no write that would renew the credit.
            if position - self._granted[prompt] >= self._window // 2 and not self._due:
                self._due = True
                self._writes.add(self)

    def write(self) -> None:
        """Write what there is, unless the reader is slow: then it is written when the reader has caught up, and no credit is granted."""
        self._due = False
        if self._request.over:
            return  # the task sends the rest together with the end
        if self._chunks:
            if not self._begun:
                self._request.wake()
                return
            if self._connection.paused:
                self._note_part(waiting=True)
                return
            chunks, self._chunks = self._chunks, []
            self._note_part(waiting=False)
            self._connection.write(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        self._grant()

    def abort(self) -> None:
        self._connection.abort()

    async def run(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Send until the end. Raises the error of a request that failed before its first event."""
        while not self._chunks and not self._request.over:
            await self._request.changed()
        if self._request.failed is not None and not self._chunks:
            raise self._request.failed
        self._check_progress(-1)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self._begun = True
            self._connection.on_writable = self.write
            self.write()
            while not self._request.over:
                await self._request.changed()
            self._connection.on_writable = None
            failed = self._request.failed
            self._chunks.append(self._ending.broken(failed) if failed is not None else self._ending.last(self._request.usages))
            self._note_part(waiting=True)
            await send({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": False})
        finally:
            self._connection.on_writable = None
            if self._timer is not None:
                self._timer.cancel()

    def _note_part(self, *, waiting: bool) -> None:
        if not (self._waiting and waiting):  # what waits is one part, however it grows
            self._parts += 1
        self._waiting = waiting

    def _check_progress(self, parts_before: int) -> None:
        if self._waiting and self._parts == parts_before:
            self.abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(STALL_S, self._check_progress, self._parts)

    def _grant(self) -> None:
        for prompt, position in enumerate(self._received):
            if position - self._granted[prompt] >= self._window // 2:
                self._request.credit(prompt, position - self._granted[prompt])
                self._granted[prompt] = position
