"""A generating request answered as server-sent events, written with raw ASGI sends.

Owns the bytes not yet sent and the credit that bounds them: a reader that stops stops the generation, not the router. Nothing is sent
before the first event, so what fails until then still gets its own HTTP status; after it, an error is an event and the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Send

from orchestrator.router.frontend import tool_parsers
from orchestrator.router.frontend.schema import ChatBody, Request
from orchestrator.router.http.dialects import openai
from orchestrator.router.http.in_flight import HttpExchange
from workers.protocol.errors import Cancelled, TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage

#: Tokens in flight to one reader (fewer with logprobs, which are longer): at 200 bytes and 2 KB a token, some 50 and 130 KB.
WINDOW, WINDOW_LOGPROBS = 256, 64
#: Seconds between looks at a send that does not return; the second look in a row cuts the connection.
STALL_S = 15.0


def window(request: Request) -> int:
    return WINDOW if request.wanted_logprobs() is None else WINDOW_LOGPROBS


class EventSink:
    """Sink of one ask: makes events of what comes. The common chunk (text alone) is joined from prepared bytes."""

    def __init__(self, stream: EventStream, exchange: HttpExchange, index: int, request: Request, wording: openai.Wording) -> None:
        self._stream, self._exchange, self._index, self._wording = stream, exchange, index, wording
        ask = exchange.prepared.asks[index]
        self._offset = index * ask.n
        self._prompt_tokens = len(ask.prompt_ids)
        self._openings = [wording.opening(self._offset + choice) for choice in range(ask.n)]
        self._closing = wording.closing()
        self._begun = [False] * ask.n
        self._writers = [openai.LogprobWriter(exchange.prepared.model, wording.chat) for _ in range(ask.n)]
        self._with_logprobs = request.wanted_logprobs() is not None
        self._echo = exchange.prepared.prompts[index] if exchange.prepared.prompts else ""
        chat = request if isinstance(request, ChatBody) else None
        self._readers = [tool_parsers.reader(chat) if chat else None for _ in range(ask.n)]
        self._plain = not (self._with_logprobs or wording.continuous or self._readers[0])

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._stream.received(self._index, first + len(tokens))
        if self._plain and self._begun[choice]:
            if text:
                self._stream.push(self._openings[choice] + openai.encode(text) + self._closing)
            return
        reader = self._readers[choice]
        if reader is not None:
            text = reader.feed(text)
        if not self._begun[choice]:
            self._begin(choice)
        shown = self._writers[choice].write(logprobs) if logprobs else None
        if text or shown:
            self._write(choice, text, first + len(tokens), shown)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        if self._echo and self._with_logprobs:
            self._begun[choice] = True
            self._write(choice, self._echo, 0, self._writers[choice].write(logprobs))

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        if reason == "cancelled":
            self.on_failed(choice, Cancelled("the request was cancelled"))
            return
        if not self._begun[choice]:
            self._begin(choice)
        finish: str = reason
        reader = self._readers[choice]
        if reader is not None:
            shown = reader.feed(tail)
            rest, calls = reader.finish()
            tail = shown + rest
            if calls:
                finish = "tool_calls" if reason == "stop" else reason
                self._write_calls(choice, calls)
        if tail:
            self._write(choice, tail, usage.output_tokens, None)
        last = self._wording.choice(self._offset + choice, "", first=False, reason=finish)
        last["stop_reason"] = None if stopped_by in self._exchange.prepared.model.eos_ids else stopped_by
        self._stream.push(self._wording.chunk([last], self._usage(usage.output_tokens)))
        self._exchange.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._exchange.fail(error)

    def _begin(self, choice: int) -> None:
        """A chat begins with its role, an echoing completion with its prompt."""
        self._begun[choice] = True
        if self._wording.chat:
            self._stream.push(self._wording.chunk([self._wording.choice(self._offset + choice, "", first=True)], self._usage(0)))
        elif self._echo:
            self._write(choice, self._echo, 0, None)
            self._writers[choice].skip(self._echo)

    def _write(self, choice: int, text: str, output_tokens: int, logprobs: Any) -> None:
        shown = self._wording.choice(self._offset + choice, text, first=False, logprobs=logprobs)
        self._stream.push(self._wording.chunk([shown], self._usage(output_tokens)))

    def _write_calls(self, choice: int, calls: list[dict[str, Any]]) -> None:
        deltas = [{"index": index, **call} for index, call in enumerate(calls)]
        shown = {"index": self._offset + choice, "delta": {"tool_calls": deltas}, "logprobs": None, "finish_reason": None}
        self._stream.push(self._wording.chunk([shown]))

    def _usage(self, output_tokens: int) -> dict[str, Any] | None:
        return openai.usage_json(self._prompt_tokens, output_tokens) if self._wording.continuous else None


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
