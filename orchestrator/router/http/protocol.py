"""uvicorn's httptools protocol with what it lacks: bounds (URL, header bytes and count, deadlines for header and body), and the parts of
HTTP that uvicorn leaves out.

Owns the counters of one connection's current request. Where a bound is exceeded it answers in place of the application and closes the
connection. It never reads a body; the application does, under its own limit.

A wish for another protocol (``Upgrade``) is ignored (RFC 9110, 7.8). HTTP/1.0 gets no chunks and no 100 Continue (RFC 9112, 7.1;
RFC 9110, 10.1.1). After an answer that came before the end of a request's body, a short rest of the body is read and the connection goes
on; otherwise the connection ends so that the client still reads the answer (RFC 9112, 9.6).

    waiting (keep-alive) --first byte--> header (HEADER_DEADLINE_S) --headers complete--> body (BODY_DEADLINE_S) --complete--> answering
    header, body --a bound is exceeded--> refused: answer, end of sending, LINGER_S, closed
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

import httptools
import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from orchestrator.router.http.connections import Connections
from workers.protocol.running_clock import LONGEST_TURN_S

MAX_URL = 8 << 10
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 100
#: Seconds from a request's first byte to its last header, and from there to the end of its body.
HEADER_DEADLINE_S = 10.0
BODY_DEADLINE_S = 30.0
#: Seconds that a refused peer may continue to send; what it sends is ignored.
LINGER_S = 2.0
#: Bytes that may wait in this process for the socket of a slow reader; then the stream is paused.
WRITE_BUFFER = 16 << 10
#: Largest body whose rest is read after an early answer; for a larger one, or one of unknown length, the connection ends.
MAX_DISCARDED = 256 << 10
VERSIONS = ("1.0", "1.1")
#: Key in the state of an ASGI scope: the :class:`AnswerConnection` of the request.
CONNECTION = "trireme.connection"

_REASONS = {
    400: "Bad Request", 408: "Request Timeout", 414: "URI Too Long", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    501: "Not Implemented", 505: "HTTP Version Not Supported",
}  # fmt: skip
_TOO_MUCH = f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"


class _BoundPassed(Exception):
    """Stops the parser inside a callback; httptools raises it again as its own error."""


class AnswerConnection:
    """What ASGI does not offer to the answer of a request: parts of its body are written at once, without a task's turn for each, and the
    loss of the connection is told. The answer sets ``on_writable`` and ``on_lost``."""

    __slots__ = ("_cycle", "_protocol", "on_lost", "on_writable")

    def __init__(self, protocol: BoundedProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol, self._cycle = protocol, cycle
        self.on_lost: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def lost(self) -> bool:
        return self._cycle.disconnected

    @property
    def paused(self) -> bool:
        """The reader is slow: as many bytes wait for it as may."""
        return self._protocol.flow.write_paused

    def write(self, part: bytes) -> None:
        """Write a part of the body, after ASGI has sent the head and before it sends the last part. Not while it is ``paused``."""
        if not self._cycle.disconnected:
            self._protocol.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if self._cycle.chunked_encoding else part)

    def abort(self) -> None:
        """Drop the connection together with its unsent bytes."""
        self._protocol.abort()

    def lose(self) -> None:
        """The peer takes nothing more of this answer."""
        self._cycle.disconnected = True
        if self.on_lost is not None:
            self.on_lost()


class _Answer:
    """The answer to a request of HTTP/1.0, or to one whose body has not come whole when the application starts: ASGI ``send``."""

    def __init__(self, protocol: BoundedProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol, self._cycle = protocol, cycle
        self._unsized = self._early = False

    async def send(self, message: Message) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if cycle.scope["http_version"] == "1.0" and not any(name.lower() == b"content-length" for name, _ in headers):
                # The end of the connection is the end of the answer.
                self._unsized, cycle.chunked_encoding = True, False
            self._early = cycle.more_body and (cycle.waiting_for_100_continue or not _is_short(cycle.scope["headers"]))
            if self._early:
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
        else:
            if self._unsized:
                cycle.expected_content_length = len(message.get("body", b""))
            if self._early and not message.get("more_body", False):
                cycle.keep_alive = True  # uvicorn would close at once, and the client would lose the answer
                await cycle.send(message)  # type: ignore[arg-type]
                self._protocol.end_sending()
                return
        await cycle.send(message)  # type: ignore[arg-type]


def _is_short(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the body of a request with these headers is known to be so short that its rest may be read for nothing."""
    declared = next((value for name, value in headers if name == b"content-length"), None)
    return declared is not None and int(declared) <= MAX_DISCARDED


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Refusals are JSON as in all answers, then the connection closes."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted = connections
        self._head_bytes = self._header_bytes = 0
        self._in_head = True
        self._refused = False
        #: The head of a request that asks for another protocol, without that wish; empty for other requests.
        self._plain_head = b""
        self._deadline: asyncio.TimerHandle | None = None
        #: That of the request that is being answered, or was answered last.
        self._answering: AnswerConnection | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._expect(self.timeout_keep_alive)
        if why := self._counted.enter(self._address):
            self._answer(429, why, "rate_limit_error", "overloaded")
            transport.close()  # at once, for what is short is descriptors

    @property
    def _address(self) -> str:
        return self.client[0] if self.client is not None else ""

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._counted.leave(self._address)
        super().connection_lost(exc)
        if self._answering is not None:
            self._answering.lose()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if not self._refused:
                self._answer(400, "the request is not valid HTTP/1.1")
        # The parser keeps an unfinished header, so the bytes that went into it are counted, not only the headers that came out.
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_URL + MAX_HEADER_BYTES and not self._refused:
            self._answer(431, _TOO_MUCH)

    def _parse(self, data: bytes) -> None:
        """Feed the parser. It stops after a head with ``Upgrade`` and would take the body for another protocol, so a new one gets the head
        without it. Raises HttpParserError."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                data = self._plain_head + data[stopped.args[0] :]
                self._plain_head = b""
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes, self._in_head = 0, True
        self._expect(HEADER_DEADLINE_S)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL:
            self._refuse(414, f"the URL is longer than {MAX_URL} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(431, _TOO_MUCH)

    def on_headers_complete(self) -> None:
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if version not in VERSIONS:
            self._refuse(505, f"HTTP/{version} is not spoken here; it is HTTP/1.1")
        if method == b"CONNECT":
            self._refuse(501, "this server is no proxy")
        if self.parser.should_upgrade():
            lines = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self._plain_head = b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version.encode()), *lines, b"", b""])
            return
        if version == "1.0":
            self.expect_100_continue = False
        self._in_head = False
        self._expect(BODY_DEADLINE_S)
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        async def answered(scope: Scope, receive: Receive, send: Send) -> None:
            special = cycle.more_body or scope["http_version"] == "1.0"
            await app(scope, receive, _Answer(self, cycle).send if special else send)

        self._answering = cycle.scope["state"][CONNECTION] = AnswerConnection(self, cycle)
        super()._start_asgi_task(cycle, answered)  # type: ignore[arg-type]

    def on_message_complete(self) -> None:
        if self._plain_head:
            return
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes when the waiting bytes are sent, which must not take for ever
            self._expect(None)
            self._deadline = self.loop.call_later(BODY_DEADLINE_S, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering is not None and self._answering.on_writable is not None:
            self._answering.on_writable()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.abort()
        else:
            super().timeout_keep_alive_handler()

    def abort(self) -> None:
        """Drop the connection with a reset; otherwise the kernel would keep the unsent bytes for a peer that reads nothing."""
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _expect(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._late, self.loop.time() + seconds, seconds) if seconds is not None else None

    def _late(self, due: float, seconds: float) -> None:
        """``seconds`` passed without what was expected, until ``due`` by the loop's clock."""
        if self.loop.time() - due > LONGEST_TURN_S:
            # This process did not run, so nothing could arrive.
            self._expect(seconds)
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.abort()
        else:
            self._answer(408, "the request did not arrive in time")

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, message)
        raise _BoundPassed

    def _answer(self, status: int, message: str, kind: str = "invalid_request_error", code: str = "invalid_request") -> None:
        if self.transport.is_closing():
            return
        self._refused = True
        self.pipeline.clear()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:  # a second answer cannot begin inside the first
                self.abort()
                return
            # The application's own answer is discarded.
            cycle.disconnected, cycle.waiting_for_100_continue = True, False
            cycle.message_event.set()
            if self._answering is not None:
                self._answering.lose()
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = msgspec.json.encode({"error": error})
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.end_sending()

    def end_sending(self) -> None:
        """End the connection after what was written. Closing with unread bytes would reset it and lose the answer, so only the sending side
        ends, and what the peer still sends is read for a while and ignored."""
        self._refused = True
        self._expect(None)
        if self.transport.is_closing():
            return  # the client has gone before
        if not self.transport.can_write_eof():
            self.transport.close()  # TLS: it reads on until the peer has ended too
            return
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)
