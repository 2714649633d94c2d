"""The response to a generating request, whatever dialect it is in: submitted when it is sent, cancelled at once when the client leaves.

Owns the exchange from the first byte of the answer to its last. What the bytes say is its :class:`Dialect`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.http.dialects.openai.wording import encode
from orchestrator.router.http.event_stream import EventStream
from orchestrator.router.http.in_flight import HttpExchange
from orchestrator.router.http.middleware import request_id
from orchestrator.router.http.protocol import ABORT
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.metrics import Metrics


class Dialect(Protocol):
    """How one request is answered. ``streamed``: by :meth:`events`, else by :meth:`whole`."""

    streamed: bool

    def events(self, exchange: HttpExchange, abort: Callable[[], None]) -> tuple[EventStream, list[TextSink]]:
        """The stream, and a sink for each ask that fills it; ``abort`` drops the connection."""

    def whole(self, exchange: HttpExchange) -> tuple[list[TextSink], Callable[[], bytes]]:
        """A sink for each ask, and what makes the body of them once all have ended."""


class GenerateResponse:
    """An ASGI application for one prepared request."""

    def __init__(self, exchange: HttpExchange, dialect: Dialect, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._exchange, self._dialect, self._dispatcher, self._metrics = exchange, dialect, dispatcher, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        listening = asyncio.create_task(self._listen(receive))
        try:
            if self._dialect.streamed:
                await self._stream(scope, send)
            else:
                await self._whole(scope, receive, send)
        finally:
            listening.cancel()
            self._exchange.leave()

    async def _stream(self, scope: Scope, send: Send) -> None:
        abort = scope.get("state", {}).get(ABORT, self._exchange.leave)
        stream, sinks = self._dialect.events(self._exchange, abort)
        self._exchange.start(self._dispatcher, self._metrics, sinks)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", request_id(scope).encode()),
        ]
        await stream.run(send, headers)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        sinks, body = self._dialect.whole(self._exchange)
        self._exchange.start(self._dispatcher, self._metrics, sinks)
        while not self._exchange.over:
            await self._exchange.news()
        if self._exchange.failed is not None:
            raise self._exchange.failed
        if self._exchange.left:
            return
        await Response(body(), 200, {"x-request-id": request_id(scope)}, "application/json")(scope, receive, send)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._exchange.over:
            self._metrics.disconnected()
            self._exchange.leave()


def json_response(http: Request, content: object) -> Response:
    return Response(encode(content), 200, {"x-request-id": request_id(http.scope)}, "application/json")
