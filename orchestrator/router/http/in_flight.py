"""One generating HTTP request in flight: its rows at the dispatcher, and what has come back of them.

Owns the tickets and the meters until every choice has ended or the client has left, whichever is first. All calls happen on the event
loop; nothing here awaits, so a token costs what it costs and no task switch.
"""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator.router.frontend.detokenizer import Detokenizer, TextSink
from orchestrator.router.frontend.preprocess import PreparedRequest
from orchestrator.router.http.dialects.openai import wording as openai
from orchestrator.router.interfaces import Dispatcher, Ticket
from orchestrator.router.metrics import Metrics, RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Usage


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
