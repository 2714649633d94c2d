"""One generating HTTP request in flight: its tickets at the dispatcher, and what has come back so far.

Owns the tickets and the meters until every choice has ended or the client has left, whichever is first. All calls happen on the event
loop and nothing here awaits on the way of a token.

    prepared --submit--> in flight --every choice ended--> over
    in flight --the first error--> failed (over); --cancel--> cancelled (over)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from orchestrator.router.frontend.detokenizer import Detokenizer, TextSink
from orchestrator.router.frontend.preprocess import PreparedRequest
from orchestrator.router.http.quota import KeyQuota
from orchestrator.router.interfaces import Dispatcher, Ticket
from orchestrator.router.metrics import Metrics, RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Usage


class InFlightRequest:
    """Submits a prepared request and counts the choices that are open. ``failed``: the first error. ``usages``: of the choices that have
    ended, by prompt."""

    def __init__(self, prepared: PreparedRequest, dispatcher: Dispatcher, metrics: Metrics, quota: KeyQuota) -> None:
        self.prepared, self._dispatcher, self._metrics, self._quota = prepared, dispatcher, metrics, quota
        self.failed: TriremeError | None = None
        self.usages: list[list[Usage]] = [[] for _ in prepared.requests]
        self.cancelled = False
        self._open = sum(request.n for request in prepared.requests)
        self._submitted: list[tuple[Ticket, RequestMeter]] = []
        self._detokenizers: list[Detokenizer] = []
        self._changed = asyncio.Event()

    @property
    def over(self) -> bool:
        return self._open == 0 or self.failed is not None or self.cancelled

    def submit(self, sinks: Sequence[TextSink]) -> None:
        """Submit the request of every prompt with its sink. Raises what the dispatcher raises, and RateLimited; then :meth:`cancel` frees
        what was accepted before."""
        prepared = self.prepared
        self._quota.admit(prepared.reserve)
        for index, (request, sink) in enumerate(zip(prepared.requests, sinks, strict=True)):
            prompt_tokens = len(request.prompt_ids)
            meter = self._metrics.request(request.model, choices=request.n, prompt_tokens=prompt_tokens)
            detokenizer = Detokenizer(
                prepared.model.table, prepared.rule, sink, stop_choice=partial(self._stop_choice, index), choices=request.n,
                prompt_tokens=prompt_tokens, meter=meter,
            )  # fmt: skip
            ticket = self._dispatcher.submit(request, detokenizer, meter)
            meter.admitted()
            self._submitted.append((ticket, meter))
            self._detokenizers.append(detokenizer)

    def cancel(self) -> None:
        """The client is gone, or the answer is complete: free what still runs. The dispatcher hears of it only where a choice has not
        ended."""
        self.cancelled = True
        for ticket, meter in self._submitted:
            ticket.cancel()
            meter.left()
        self._submitted.clear()
        prompts = sum(detokenizer.prompt_tokens for detokenizer in self._detokenizers)
        self._quota.settle(prompts, sum(detokenizer.output_tokens for detokenizer in self._detokenizers))
        self._changed.set()

    def credit(self, prompt: int, tokens: int) -> None:
        if self._submitted:
            self._submitted[prompt][0].credit(tokens)

    def ended(self, prompt: int, usage: Usage) -> None:
        """A choice of a prompt has ended."""
        self.usages[prompt].append(usage)
        self._open -= 1
        self._changed.set()

    def fail(self, error: TriremeError) -> None:
        if self.failed is None:
            self.failed = error
            self._changed.set()

    def wake(self) -> None:
        """Let :meth:`changed` return."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait until the state has changed, or :meth:`wake` was called, since the last call."""
        await self._changed.wait()
        self._changed.clear()

    def _stop_choice(self, prompt: int, choice: int) -> None:
        if self._submitted:
            self._submitted[prompt][0].stop_choice(choice)
