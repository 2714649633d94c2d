"""The response to a generating request, in any dialect: submitted when it is sent, cancelled at once when the client leaves.

Owns the request in flight from the first byte of the answer to the last. A :class:`ResponseBuilder` decides what the bytes say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.http.event_stream import EventStream, StreamEnding, StreamWrites, encode
from orchestrator.router.http.in_flight import InFlightRequest
from orchestrator.router.http.middleware import answer_headers
from orchestrator.router.http.protocol import CONNECTION, AnswerConnection
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

    def __init__(self, request: InFlightRequest, builder: ResponseBuilder, metrics: Metrics, writes: StreamWrites) -> None:
        self._request, self._builder, self._metrics, self._writes = request, builder, metrics, writes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: AnswerConnection = scope["state"][CONNECTION]
        if connection.lost:
            self._metrics.disconnected()
            return
        connection.on_lost = self._on_lost
        try:
            if self._builder.streamed:
                await self._stream(scope, send, connection)
            else:
                await self._whole(scope, receive, send)
        finally:
            connection.on_lost = None
            self._request.cancel()

    async def _stream(self, scope: Scope, send: Send, connection: AnswerConnection) -> None:
        stream = EventStream(self._request, self._builder, connection, self._writes)
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

    def _on_lost(self) -> None:
        if not self._request.over:
            self._metrics.disconnected()
            self._request.cancel()


def json_response(http: Request, content: object) -> Response:
    return Response(encode(content), 200, answer_headers(http.scope), "application/json")
