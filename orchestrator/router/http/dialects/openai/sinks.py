"""The output of a generating request in OpenAI's dialect: one JSON body, or a stream of events.

Owns what of the output is not yet written. One sink per prompt; its choices have the numbers from ``prompt * n`` on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.frontend.schema import Body
from orchestrator.router.frontend.tool_parsers import choice_parser
from orchestrator.router.frontend.tool_parsers.events import CallDropped, TextDelta, ToolEvent, whole
from orchestrator.router.http.dialects.openai.wording import (
    DONE,
    LogprobWriter,
    Wording,
    error_body,
    merge_logprobs,
    prompt_logprobs_json,
    total_usage,
    usage_json,
)
from orchestrator.router.http.event_stream import EventStream, encode, event
from orchestrator.router.http.in_flight import InFlightRequest
from workers.protocol.errors import Cancelled, TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage


class EventSink:
    """The sink of one prompt that makes events. The common event (text alone) is joined from prepared bytes."""

    def __init__(self, stream: EventStream, request: InFlightRequest, index: int, body: Body, wording: Wording) -> None:
        self._stream, self._request, self._index, self._wording = stream, request, index, wording
        prepared = request.prepared
        prompt = prepared.requests[index]
        n = prompt.n
        self._offset = index * n
        self._prompt_ids = prompt.prompt_ids
        self._prompt_tokens = len(prompt.prompt_ids)
        self._with_ids = bool(body.return_token_ids)
        self._openings = [wording.opening(self._offset + choice) for choice in range(n)]
        self._closing = wording.closing()
        self._begun = [False] * n
        as_ids = bool(body.return_tokens_as_token_ids)
        self._writers = [LogprobWriter(prepared.model, wording.chat, as_ids=as_ids) for _ in range(n)]
        self._with_logprobs = body.num_logprobs is not None
        self._echo = prepared.echoes[index] if prepared.echoes else ""
        rules = body.tool_rules()
        self._tool_parsers = [None if rules is None else choice_parser(rules, prepared.model.tool_parser) for _ in range(n)]
        #: Indices of each choice's calls.
        self._calls: list[set[int]] = [set() for _ in range(n)]
        self._plain = not (self._with_logprobs or self._with_ids or wording.continuous or rules is not None)

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._stream.received(self._index, first + len(tokens))
        if self._plain and self._begun[choice]:
            if text:
                self._stream.push(self._openings[choice] + encode(text) + self._closing)
            return
        if not self._begun[choice]:
            self._begin(choice)
        shown = self._writers[choice].write(logprobs) if logprobs else None
        parser = self._tool_parsers[choice]
        if parser is not None:
            self._write_events(choice, parser.feed(text), first + len(tokens), shown, tokens)
        elif text or shown or self._with_ids:
            self._write(choice, text, first + len(tokens), shown, tokens)

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
        parser = self._tool_parsers[choice]
        if parser is not None:
            self._write_events(choice, [*parser.feed(tail), *parser.finish(cut=reason == "length")], usage.output_tokens, None)
            finish = self._wording.finish(reason, called=bool(self._calls[choice]))
        elif tail:
            self._write(choice, tail, usage.output_tokens, None)
        last = self._wording.choice(self._offset + choice, "", first=False, reason=finish)
        last["stop_reason"] = None if stopped_by in self._request.prepared.model.eos_ids else stopped_by
        self._stream.push(self._wording.chunk([last], self._usage(usage.output_tokens)))
        self._request.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._request.fail(error)

    def _begin(self, choice: int) -> None:
        """A chat begins with its role; what an answer repeats comes before its own text."""
        self._begun[choice] = True
        if self._wording.chat:
            more = {"prompt_token_ids": self._prompt_ids} if self._with_ids else {}
            role = self._wording.choice(self._offset + choice, "", first=True)
            self._stream.push(self._wording.chunk([role], self._usage(0), **more))
        elif self._with_ids and not self._echo:
            self._write(choice, "", 0, None)
        if self._echo:
            self._write(choice, self._echo, 0, None)
            self._writers[choice].skip(self._echo)

    def _write(self, choice: int, text: str, output_tokens: int, logprobs: Any, tokens: list[int] | None = None) -> None:
        """``tokens``: the output tokens that the chunk stands for."""
        shown = self._wording.choice(self._offset + choice, text, first=False, logprobs=logprobs)
        if self._with_ids:
            shown["token_ids"] = tokens or []
            if not self._wording.chat and output_tokens == 0:
                shown["prompt_token_ids"] = self._prompt_ids
        self._stream.push(self._wording.chunk([shown], self._usage(output_tokens)))

    def _write_events(
        self, choice: int, events: Sequence[ToolEvent], output_tokens: int, logprobs: Any, tokens: list[int] | None = None
    ) -> None:  # fmt: skip
        """A chunk an event; the first has the logprobs and the token ids, and a chunk without text where there is no event."""
        for found in events:
            if isinstance(found, TextDelta):
                self._write(choice, found.text, output_tokens, logprobs, tokens)
            elif isinstance(found, CallDropped):
                self._calls[choice].discard(found.index)
                continue
            else:
                self._calls[choice].add(found.index)
                delta = self._wording.call_delta(found)
                shown: dict[str, Any] = {"index": self._offset + choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                if self._with_ids:
                    shown["token_ids"] = tokens or []
                self._stream.push(self._wording.chunk([shown], self._usage(output_tokens)))
            logprobs = tokens = None
        if logprobs is not None or (tokens and self._with_ids):
            self._write(choice, "", output_tokens, logprobs, tokens)

    def _usage(self, output_tokens: int) -> dict[str, Any] | None:
        return usage_json(self._prompt_tokens, output_tokens) if self._wording.continuous else None


class BodySink:
    """The sink of one prompt that keeps the whole output, for an answer in one piece."""

    def __init__(self, request: InFlightRequest, index: int, body: Body, wording: Wording) -> None:
        self._request, self._index, self._body, self._wording = request, index, body, wording
        prepared = request.prepared
        self._n = n = prepared.requests[index].n
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        as_ids = bool(body.return_tokens_as_token_ids)
        self._writers = [LogprobWriter(prepared.model, wording.chat, as_ids=as_ids) for _ in range(n)]
        self._ends: dict[int, tuple[FinishReason, str | int | None]] = {}
        self._prompt: dict[int, list[Logprobs]] = {}
        self._echo = prepared.echoes[index] if prepared.echoes else ""

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._prompt[choice] = logprobs
        if self._echo and self._body.num_logprobs is not None and not self._wording.chat:
            self._logprobs[choice].append(self._writers[choice].write(logprobs))

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._texts[choice].append(text)
        if self._body.return_token_ids:
            self._tokens[choice] += tokens
        if logprobs:
            self._logprobs[choice].append(self._writers[choice].write(logprobs))

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        if reason == "cancelled":
            self.on_failed(choice, Cancelled("the request was cancelled"))
            return
        self._texts[choice].append(tail)
        self._ends[choice] = (reason, stopped_by)
        self._request.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._request.fail(error)

    def choices(self) -> list[dict[str, Any]]:
        return [self._choice(choice) for choice in range(self._n)]

    def _choice(self, choice: int) -> dict[str, Any]:
        reason, stopped_by = self._ends[choice]
        text = "".join(self._texts[choice])
        finish: str = reason
        if self._wording.chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            rules = self._body.tool_rules()
            if rules is not None:
                parser = choice_parser(rules, self._request.prepared.model.tool_parser)
                content, calls = whole([*parser.feed(text), *parser.finish(cut=reason == "length")])
                message["content"] = content
                finish = self._wording.finish(reason, called=bool(calls))
                if calls:
                    written = {"function_call": calls[0]["function"]} if self._wording.functions else {"tool_calls": calls}
                    message |= {"content": content or None, **written}
            if self._echo:
                message["content"] = self._echo + (message["content"] or "")
            shown: dict[str, Any] = {"message": message}
        else:
            shown = {"text": self._echo + text}
        found: dict[str, Any] = {
            "index": self._index * self._n + choice,
            **shown,
            "logprobs": merge_logprobs(self._logprobs[choice]),
            "finish_reason": finish,
            "stop_reason": self._stop_reason(stopped_by),
        }
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_json(self._request.prepared.model, self._prompt.get(choice, []))
        if self._body.return_token_ids:
            found["token_ids"] = self._tokens[choice]
            if not self._wording.chat:
                found["prompt_token_ids"] = self._request.prepared.requests[self._index].prompt_ids
        return found

    def _stop_reason(self, stopped_by: str | int | None) -> str | int | None:
        return None if stopped_by in self._request.prepared.model.eos_ids else stopped_by


class OpenAiResponse:
    """A :class:`~orchestrator.router.http.response.ResponseBuilder`."""

    def __init__(self, body: Body, wording: Wording) -> None:
        self.streamed = bool(body.stream)
        self._body, self._wording = body, wording

    def stream_sinks(self, request: InFlightRequest, stream: EventStream) -> Sequence[TextSink]:
        prompts = range(len(request.prepared.requests))
        return [EventSink(stream, request, index, self._body, self._wording) for index in prompts]

    def last(self, usages: Sequence[Sequence[Usage]]) -> bytes:
        """The usage where it was asked for, and the event that ends every stream."""
        return (self._wording.chunk([], total_usage(usages)) if self._wording.usage else b"") + DONE

    def broken(self, error: TriremeError) -> bytes:
        return event(error_body(error))

    def whole_sinks(self, request: InFlightRequest) -> tuple[Sequence[TextSink], Callable[[], bytes]]:
        sinks = [BodySink(request, index, self._body, self._wording) for index in range(len(request.prepared.requests))]

        def body() -> bytes:
            choices = [choice for sink in sinks for choice in sink.choices()]
            with_prompt = self._wording.chat and self._body.return_token_ids
            more = {"prompt_token_ids": request.prepared.requests[0].prompt_ids} if with_prompt else {}
            return self._wording.answer(choices, total_usage(request.usages), **more)

        return sinks, body
