"""The body of a streamed response: server-sent events, written with raw ASGI sends.

The bytes of an event are made by the dialect's sinks (:mod:`orchestrator.router.http.dialects.openai.sinks` and ``wording``,
:mod:`orchestrator.router.http.dialects.kserve.api`), with :func:`event` where JSON is encoded whole. This module joins and sends them.
Owns the events that are not sent yet and the credit that bounds them: when the reader stops, the generation stops, and the router keeps at
most ``credit`` tokens per prompt. Nothing is sent before the first event, so an error until then still has its own HTTP status; a later
error is an event, and the stream ends after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from orchestrator.router.frontend.schema import Body
from orchestrator.router.http.in_flight import InFlightRequest
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Usage

#: Tokens in flight to one reader (fewer with logprobs, which are longer): at 200 bytes and 2 KB a token, some 50 and 130 KB.
WINDOW, WINDOW_LOGPROBS = 256, 64
#: Seconds between two checks of a send that does not return; the connection is dropped at the second check that finds the same send.
STALL_S = 15.0

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


class EventStream:
    """Joins the events since the last send into one send, and grants credit for what was sent. ``abort`` drops the connection."""

    def __init__(self, request: InFlightRequest, ending: StreamEnding, abort: Callable[[], None]) -> None:
        self._request, self._ending, self._abort = request, ending, abort
        self._chunks: list[bytes] = []
        prompts = request.prepared.requests
        self._window = prompts[0].credit
        self._received = [0] * len(prompts)
        self._granted = [0] * len(prompts)
        self._sends = 0
        self._sending = False
        self._timer: asyncio.TimerHandle | None = None

    def push(self, chunk: bytes) -> None:
        if not self._chunks:
            self._request.wake()
        self._chunks.append(chunk)

    def received(self, prompt: int, position: int) -> None:
        """Count the output tokens of a prompt. Credit goes to all its choices alike, so the furthest choice counts."""
        if position > self._received[prompt]:
            self._received[prompt] = position
            if position - self._granted[prompt] >= self._window:
                # All credit is spent. Where the tokens had no text, there will be no send that could renew it.
                self._request.wake()

    async def run(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Write until the end. Raises the error of a request that failed before its first event."""
        while not self._chunks and not self._request.over:
            await self._wait()
        if self._request.failed is not None and not self._chunks:
            raise self._request.failed
        self._check_progress(-1)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while not self._request.over:
                if self._chunks:
                    await self._send(send, more=True)
                    self._grant()
                else:
                    await self._wait()
            failed = self._request.failed
            self._chunks.append(self._ending.broken(failed) if failed is not None else self._ending.last(self._request.usages))
            await self._send(send, more=False)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _wait(self) -> None:
        await self._request.changed()
        if not self._chunks:
            self._grant()

    def _check_progress(self, sends_before: int) -> None:
        if self._sending and self._sends == sends_before:
            self._abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(STALL_S, self._check_progress, self._sends)

    async def _send(self, send: Send, *, more: bool) -> None:
        body = b"".join(self._chunks)
        self._chunks.clear()
        self._sends += 1
        self._sending = True
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = False

    def _grant(self) -> None:
        for prompt, position in enumerate(self._received):
            if position - self._granted[prompt] >= self._window // 2:
                self._request.credit(prompt, position - self._granted[prompt])
                self._granted[prompt] = position
