"""A generating request answered as server-sent events, written with raw ASGI sends.

Owns the bytes not yet sent and the credit that bounds them: a reader that stops stops the generation, not the router. Nothing is sent
before the first event, so what fails until then still gets its own HTTP status; after it, an error is an event and the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Send

from orchestrator.router.frontend.schema import Request
from orchestrator.router.http.in_flight import HttpExchange
from workers.protocol.errors import TriremeError

#: Tokens in flight to one reader (fewer with logprobs, which are longer): at 200 bytes and 2 KB a token, some 50 and 130 KB.
WINDOW, WINDOW_LOGPROBS = 256, 64
#: Seconds between looks at a send that does not return; the second look in a row cuts the connection.
STALL_S = 15.0


def window(request: Request) -> int:
    return WINDOW if request.wanted_logprobs() is None else WINDOW_LOGPROBS


class Ending(Protocol):
    """How a dialect ends its streams."""

    def last(self, usage: dict[str, Any]) -> bytes:
        """What follows the last event of an answer that is whole."""

    def broken(self, error: TriremeError) -> bytes:
        """The event that ends one which is not."""


class EventStream:
    """The writing side: joins what has come since the last send into one, and grants credit for what was sent."""

    def __init__(self, exchange: HttpExchange, ending: Ending, *, window: int, abort: Callable[[], None]) -> None:
        self._exchange, self._ending = exchange, ending
        self._chunks: list[bytes] = []
        self._received = [0] * len(exchange.prepared.asks)
        self._granted = [0] * len(exchange.prepared.asks)
        self._window, self._abort = window, abort
        self._sends = 0
        self._sending = False
        self._timer: asyncio.TimerHandle | None = None

    def push(self, chunk: bytes) -> None:
        if not self._chunks:
            self._exchange.tell()
        self._chunks.append(chunk)

    def received(self, ask: int, position: int) -> None:
        """Tokens of an ask so far, by its furthest choice: credit is granted to all alike, so the furthest one must not starve."""
        if position > self._received[ask]:
            self._received[ask] = position
            if position - self._granted[ask] >= self._window:
                # All credit is spent. Where it went on tokens without text, nothing will be sent that could renew it.
                self._exchange.tell()

    async def run(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Write until the end. Raises the error of a request that failed before its first event."""
        while not self._chunks and not self._exchange.over:
            await self._wait()
        if self._exchange.failed is not None and not self._chunks:
            raise self._exchange.failed
        self._look(-1)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while not self._exchange.over:
                if self._chunks:
                    await self._send(send, more=True)
                    self._grant()
                else:
                    await self._wait()
            failed = self._exchange.failed
            self.push(self._ending.broken(failed) if failed is not None else self._ending.last(self._exchange.usage()))
            await self._send(send, more=False)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _wait(self) -> None:
        await self._exchange.news()
        if not self._chunks:
            self._grant()

    def _look(self, seen: int) -> None:
        if self._sending and self._sends == seen:
            self._abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(STALL_S, self._look, self._sends)

    async def _send(self, send: Send, *, more: bool) -> None:
        body = b"".join(self._chunks)
        self._chunks.clear()
        self._sends += 1
        self._sending = True
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = False

    def _grant(self) -> None:
        for ask, position in enumerate(self._received):
            if position - self._granted[ask] >= self._window // 2:
                self._exchange.credit(ask, position - self._granted[ask])
                self._granted[ask] = position
