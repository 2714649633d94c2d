"""uvicorn's httptools protocol with the bounds that it lacks: URL, header bytes and count, and deadlines for header and body.

Owns the counters of one connection's current request. Where a bound is exceeded it answers in place of the application and closes the
connection. It never reads a body; the application does, under its own limit.

    waiting (keep-alive) --first byte--> header (HEADER_DEADLINE_S) --headers complete--> body (BODY_DEADLINE_S) --complete--> answering
    header, body --a bound is exceeded--> refused: answer, end of sending, LINGER_S, closed
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
#: Key in the state of an ASGI scope: a function that drops the connection together with its unsent bytes.
ABORT = "trireme.abort"

_REASONS = {400: "Bad Request", 408: "Request Timeout", 414: "URI Too Long", 431: "Request Header Fields Too Large"}
_TOO_MUCH = f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"


class _BoundPassed(Exception):
    """Stops the parser inside a callback; httptools raises it again as its own error."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Refusals are JSON as everywhere, then the connection closes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = self._header_bytes = 0
        self._in_head = True
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._expect(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        # The parser keeps an unfinished header, so the bytes that went into it are counted, not only the headers that came out.
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_URL + MAX_HEADER_BYTES and not self._refused:
            self._answer(431, _TOO_MUCH)

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
        self.scope["state"][ABORT] = self.abort
        self._in_head = False
        self._expect(BODY_DEADLINE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes when the waiting bytes are sent, which must not take for ever
            self._expect(None)
            self._deadline = self.loop.call_later(BODY_DEADLINE_S, self.abort)

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

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._answer(400, "the request is not valid HTTP/1.1")

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

    def _answer(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        self._refused = True
        self._expect(None)
        self.pipeline.clear()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:  # a second answer cannot begin inside the first
                self.abort()
                return
            # The application's own answer is discarded.
            cycle.disconnected, cycle.waiting_for_100_continue = True, False
            cycle.message_event.set()
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
        body = msgspec.json.encode({"error": error})
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing with unread bytes would reset the connection and lose the answer, so end only the sending side and read on for a while.
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)
