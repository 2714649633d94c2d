"""One generating HTTP request in flight: its rows at the dispatcher, and what has come back of them.

Owns the tickets and the meters until every choice has ended or the client has left, whichever is first. All calls happen on the event
loop; nothing here awaits, so a token costs what it costs and no task switch.
"""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator.router.frontend import tool_parsers
from orchestrator.router.frontend.detokenizer import Detokenizer, TextSink
from orchestrator.router.frontend.preprocess import PreparedRequest
from orchestrator.router.frontend.schema import ChatBody, Request
from orchestrator.router.http.dialects import openai
from orchestrator.router.interfaces import Dispatcher, RouterRequest, Ticket
from orchestrator.router.metrics import Metrics, RequestMeter
from workers.protocol.errors import Cancelled, TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage


class HttpExchange:
    """Submits a prepared request and keeps count of what is open. ``failed`` is the first error, if any."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self.prepared = prepared
        self.failed: TriremeError | None = None
        self.usages: list[list[Usage]] = [[] for _ in prepared.asks]
        self.left = False
        self._open = sum(ask.n for ask in prepared.asks)
        self._live: list[tuple[Ticket, RequestMeter]] = []
        self._news = asyncio.Event()

    @property
    def over(self) -> bool:
        return self._open == 0 or self.failed is not None or self.left

    def start(self, dispatcher: Dispatcher, metrics: Metrics, sinks: list[TextSink]) -> None:
        """Submit every ask with its sink. Raises what the dispatcher raises; :meth:`leave` then frees those that it took before."""
        for ask, sink in zip(self.prepared.asks, sinks, strict=True):
            meter = metrics.request(ask.model, choices=ask.n, prompt_tokens=len(ask.prompt_ids))
            watcher = Detokenizer(
                self.prepared.model, self.prepared.rule, sink, choices=ask.n, prompt_tokens=len(ask.prompt_ids), meter=meter
            )
            ticket = dispatcher.submit(ask, watcher, meter)
            meter.admitted()
            watcher.bind(ticket)
            self._live.append((ticket, meter))

    def leave(self) -> None:
        """Nobody waits for the rest: free the rows. Harmless when all is over."""
        self.left = True
        for ticket, meter in self._live:
            ticket.cancel()
            meter.left()
        self._live.clear()
        self._news.set()

    def credit(self, ask: int, tokens: int) -> None:
        if self._live:
            self._live[ask][0].credit(tokens)

    def ended(self, ask: int, usage: Usage) -> None:
        self.usages[ask].append(usage)
        self._open -= 1
        self._news.set()

    def fail(self, error: TriremeError) -> None:
        if self.failed is None:
            self.failed = error
            self._news.set()

    def tell(self) -> None:
        """Wake the task that waits for news."""
        self._news.set()

    async def news(self) -> None:
        """Until something was told since the last call."""
        await self._news.wait()
        self._news.clear()

    def usage(self) -> dict[str, Any]:
        return openai.total_usage(self.usages)


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
