"""What becomes of a generating request's output in OpenAI's dialect: one body, or a stream of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.router.frontend import schema as bodies
from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.frontend.schema import ChatBody, Request
from orchestrator.router.frontend.tool_parsers import hermes as tool_parsers
from orchestrator.router.http import event_stream
from orchestrator.router.http.dialects.openai import wording as openai
from orchestrator.router.http.event_stream import EventStream
from orchestrator.router.http.in_flight import HttpExchange
from orchestrator.router.interfaces import RouterRequest
from workers.protocol.errors import Cancelled, TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage


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


class Gathered:
    """Sink of one ask that keeps everything, for an answer in one piece."""

    def __init__(self, exchange: HttpExchange, index: int, request: Request, wording: openai.Wording) -> None:
        self._exchange, self._index, self._request, self._wording = exchange, index, request, wording
        self._ask: RouterRequest = exchange.prepared.asks[index]
        model = exchange.prepared.model
        self._texts: list[list[str]] = [[] for _ in range(self._ask.n)]
        self._parts: list[list[dict[str, Any]]] = [[] for _ in range(self._ask.n)]
        self._writers = [openai.LogprobWriter(model, wording.chat) for _ in range(self._ask.n)]
        self._ends: dict[int, tuple[FinishReason, str | int | None]] = {}
        self._prompt: dict[int, list[Logprobs]] = {}
        self._echo = exchange.prepared.prompts[index] if exchange.prepared.prompts else ""

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._prompt[choice] = logprobs
        if self._echo and self._request.wanted_logprobs() is not None:
            self._parts[choice].append(self._writers[choice].write(logprobs))

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._texts[choice].append(text)
        if logprobs:
            self._parts[choice].append(self._writers[choice].write(logprobs))

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        if reason == "cancelled":
            self.on_failed(choice, Cancelled("the request was cancelled"))
            return
        self._texts[choice].append(tail)
        self._ends[choice] = (reason, stopped_by)
        self._exchange.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._exchange.fail(error)

    def choices(self) -> list[dict[str, Any]]:
        return [self._choice(choice) for choice in range(self._ask.n)]

    def _choice(self, choice: int) -> dict[str, Any]:
        reason, stopped_by = self._ends[choice]
        text = "".join(self._texts[choice])
        shown: dict[str, Any] = {"text": self._echo + text}
        finish: str = reason
        if isinstance(self._request, ChatBody):
            shown = {"message": {"role": "assistant", "content": text}}
            if (reader := tool_parsers.reader(self._request)) is not None:
                content = reader.feed(text)
                rest, calls = reader.finish()
                shown = {"message": {"role": "assistant", "content": (content + rest) or None, "tool_calls": calls}}
                finish = "tool_calls" if calls and reason == "stop" else reason
                if not calls:
                    shown = {"message": {"role": "assistant", "content": content + rest}}
        found = {
            "index": self._index * self._ask.n + choice,
            **shown,
            "logprobs": openai.merge_logprobs(self._parts[choice]),
            "finish_reason": finish,
            "stop_reason": self._stop_reason(stopped_by),
        }
        if self._request.prompt_logprobs is not None:
            found["prompt_logprobs"] = openai.prompt_logprobs_json(self._exchange.prepared.model, self._prompt.get(choice, []))
        return found

    def _stop_reason(self, stopped_by: str | int | None) -> str | int | None:
        return None if stopped_by in self._exchange.prepared.model.eos_ids else stopped_by


class OpenAiResponse:
    """OpenAI's :class:`~orchestrator.router.http.response.Dialect`."""

    def __init__(self, request: bodies.Request, wording: openai.Wording) -> None:
        self.streamed = bool(request.stream)
        self._request, self._wording = request, wording

    def events(self, exchange: HttpExchange, abort: Callable[[], None]) -> tuple[event_stream.EventStream, list[TextSink]]:
        stream = event_stream.EventStream(exchange, self._wording, window=event_stream.window(self._request), abort=abort)
        asks = range(len(exchange.prepared.asks))
        return stream, [EventSink(stream, exchange, index, self._request, self._wording) for index in asks]

    def whole(self, exchange: HttpExchange) -> tuple[list[TextSink], Callable[[], bytes]]:
        sinks = [Gathered(exchange, index, self._request, self._wording) for index in range(len(exchange.prepared.asks))]

        def body() -> bytes:
            return self._wording.answer([choice for sink in sinks for choice in sink.choices()], exchange.usage())

        return list(sinks), body
