"""The response to a generating request, in any dialect: submitted when it is sent, cancelled at once when the client leaves.

Owns the request in flight from the first byte of the answer to the last. A :class:`ResponseBuilder` decides what the bytes say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.http.event_stream import EventStream, StreamEnding, encode
from orchestrator.router.http.in_flight import InFlightRequest
from orchestrator.router.http.middleware import answer_headers
from orchestrator.router.http.protocol import ABORT
from orchestrator.router.metrics import Metrics


class ResponseBuilder(StreamEnding, Protocol):
    """Makes the bytes of one response in a dialect. ``streamed``: by :meth:`stream_sinks`, else by :meth:`whole_sinks`."""

    streamed: bool

    def stream_sinks(self, request: InFlightRequest, stream: EventStream) -> Sequence[TextSink]:
        """A sink for each prompt, which pushes events to ``stream``."""

    def whole_sinks(self, request: InFlightRequest) -> tuple[Sequence[TextSink], Callable[[], bytes]]:
        """A sink for each prompt, and the function that makes the body once all choices have ended."""


class GenerateResponse:
    """An ASGI application for one prepared request."""

    def __init__(self, request: InFlightRequest, builder: ResponseBuilder, metrics: Metrics) -> None:
        self._request, self._builder, self._metrics = request, builder, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        listening = asyncio.create_task(self._listen(receive))
        try:
            if self._builder.streamed:
                await self._stream(scope, send)
            else:
                await self._whole(scope, receive, send)
        finally:
            listening.cancel()
            self._request.cancel()

    async def _stream(self, scope: Scope, send: Send) -> None:
        stream = EventStream(self._request, self._builder, scope.get("state", {}).get(ABORT, self._request.cancel))
        self._request.submit(self._builder.stream_sinks(self._request, stream))
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in answer_headers(scope).items()),
        ]
        await stream.run(send, headers)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        sinks, body = self._builder.whole_sinks(self._request)
        self._request.submit(sinks)
        while not self._request.over:
            await self._request.changed()
        if self._request.failed is not None:
            raise self._request.failed
        if self._request.cancelled:
            return
        await Response(body(), 200, answer_headers(scope), "application/json")(scope, receive, send)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._request.over:
            self._metrics.disconnected()
            self._request.cancel()


def json_response(http: Request, content: object) -> Response:
    return Response(encode(content), 200, answer_headers(http.scope), "application/json")
