"""Streams from an OpenAI endpoint, read with little CPU time: one parser callback per packet, one decode per event.

Owns its connections, which it keeps for the next request. Times are recorded when bytes reach this process; no task is woken for a token.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from orchestrator.loadgen.stats import RequestSample
from orchestrator.loadgen.target import TargetRequest
from workers.protocol.errors import EngineFault, EnvironmentFault, Rejected, TriremeError, from_code
from workers.protocol.messages import ApiEndpoint

PATHS: dict[ApiEndpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
CONNECT_S = 10.0
#: Maximum bytes kept of an answer that is not a stream, and of an unfinished line.
_MAX_REFUSAL, _MAX_LINE = 64 << 10, 16 << 20


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _ChunkChoice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_ChunkChoice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _ResponseReader:
    """Reads one answer as it arrives and records its times."""

    def __init__(self, sample: RequestSample, clock: Callable[[], float]) -> None:
        self.sample, self.clock = sample, clock
        self.status = 0
        self.events = False
        self.begun = self.finished = False
        self.refusal = b""
        self.error: TriremeError | None = None
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Bytes of the body."""
        if not self.events or self.status != 200:
            self.refusal += data[: _MAX_REFUSAL - len(self.refusal)]
            return
        now = self.clock()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self.error = EngineFault("an event is longer than 16 MiB", code="broken_answer")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            self.error = EngineFault("an event is not one of OpenAI's", str(error), code="broken_answer")
            return
        if event.error is not None:
            self.error = _error(event.error, 200)
        for choice in event.choices:
            if choice.text or (choice.delta is not None and (choice.delta.content or choice.delta.reasoning_content)):
                self.sample.piece(now)
                break
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            cached = (details.cached_tokens if details is not None else None) or 0
            self.sample.counted(event.usage.prompt_tokens, event.usage.completion_tokens, cached)

    def check(self) -> None:
        """Raises the error of the answer, after its end."""
        if self.error is not None:
            raise self.error
        if self.status != 200:
            raise _refused(self.refusal, self.status)
        if not self.events:
            raise EngineFault("the answer is no stream of events", "", "is this an OpenAI endpoint?", code="not_a_stream")
        if not self.finished:
            raise EngineFault("the stream ended without its last line", code="broken_answer")
        if not self.sample.pieces:  # tokens without any text: only the end can be timed
            self.sample.piece(self.clock())


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._reading: _ResponseReader | None = None
        self._ended: asyncio.Future[None] | None = None
        self.open = False
        self.used = False

    async def exchange(self, head: bytes, reading: _ResponseReader) -> None:
        """Send a request and wait for the end of its answer. Raises EnvironmentFault when the connection breaks."""
        assert self._transport is not None
        self._reading, self._parser = reading, httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(head)
        try:
            await self._ended
        finally:
            if not self._ended.done() or self._ended.cancelled():
                self.close()
            self.used, self._reading = True, None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = cast("asyncio.Transport", transport), True

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._reading is None:
            self.close()
            return
        self._reading.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(EngineFault("the answer is not HTTP/1.1", str(error), code="broken_answer"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._reading is not None and self._reading.finished:  # a body whose end is the connection's
            self._end(None)
        self._end(EnvironmentFault("the connection broke", str(exc) if exc is not None else "the server closed it", code="connection"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading is not None and name.lower() == b"content-type":
            self._reading.events = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        if self._reading is not None and self._parser is not None:
            self._reading.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._reading is not None:
            self._reading.take(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._parser.should_keep_alive():
            self.close()
        self._end(None)

    def _end(self, error: TriremeError | None) -> None:
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)


class HttpTarget:
    """The endpoint below ``url`` (with or without ``/v1``). ``key``: bearer token, or empty. Raises Rejected on an invalid address."""

    def __init__(self, url: str, *, model: str, endpoint: ApiEndpoint, key: str = "", clock: Callable[[], float]) -> None:
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Rejected(f"{url} is not an HTTP address", "one begins with http:// or https://")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._model, self._endpoint, self._clock = model, endpoint, clock
        bearer = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = (
            f"POST {parts.path}{PATHS[endpoint]} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{bearer}"
            "content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: "
        ).encode()
        self._idle: list[_Connection] = []

    async def send(self, request: TargetRequest, sample: RequestSample) -> None:
        body = self._body(request)
        data = self._head + b"%d\r\n\r\n" % len(body) + body
        while True:
            connection = await self._connection()
            reading = _ResponseReader(sample, self._clock)
            stale = connection.used
            sample.sent(self._clock())
            try:
                await connection.exchange(data, reading)
            except EnvironmentFault:
                if stale and not reading.begun:
                    continue  # a kept connection that the server had closed: not this request's fault
                raise
            break
        if connection.open:
            self._idle.append(connection)
        reading.check()

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            if (found := self._idle.pop()).open:
                return found
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            why = str(error) or f"no connection within {CONNECT_S:g} s"
            raise EnvironmentFault(f"{self._host}:{self._port} cannot be reached", why, code="connection") from None
        return made

    def _body(self, request: TargetRequest) -> bytes:
        fields: dict[str, Any] = {"model": self._model}
        if self._endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        fields |= {"max_tokens": request.output, "temperature": request.temperature, "seed": request.seed, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        if request.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


def _refused(body: bytes, status: int) -> TriremeError:
    """The error in an answer that is not a stream."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        found = body[:200].decode(errors="replace")
    return _error(found.get("error", found) if isinstance(found, dict) else found, status)


def _error(found: Any, status: int) -> TriremeError:
    """OpenAI's error object, or other text in its place; the code is the server's own, else the status."""
    code = found.get("code") if isinstance(found, dict) else None
    message = found.get("message", found) if isinstance(found, dict) else found
    return from_code(code if isinstance(code, str) else f"http_{status}", str(message)[:300])
