"""A router core behind a traced dispatcher, for tests of spans and of log lines."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from orchestrator.router.core.request import RouterRequest
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.interfaces import Ticket
from orchestrator.router.metrics import Metrics
from orchestrator.router.tracing import TracedDispatcher
from tests.support.router_core import hello_of, router
from workers.protocol import messages
from workers.protocol.messages import Submit, ToReplica


class Ears:
    """A watcher that keeps nothing."""

    def on_tokens(self, *_: object) -> None: ...

    def on_prompt(self, *_: object) -> None: ...

    def on_cached(self, *_: object) -> None: ...

    def on_done(self, *_: object) -> None: ...

    def on_failed(self, *_: object) -> None: ...


class Stage:
    """The real core behind a traced dispatcher; the test moves the clock and acts as the replicas."""

    def __init__(self, **admission: Any) -> None:
        self.now = 100.0
        self.sent: list[ToReplica] = []
        self.ears, self._metrics = Ears(), Metrics(["m"])
        self.dispatch = RouterDispatcher(router(**admission).core, name="r", send=self._send, clock=lambda: self.now)
        self.kept = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(1.0))
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.traced = TracedDispatcher(self.dispatch, provider.get_tracer("t"), clock=lambda: self.now, wall=lambda: int(self.now * 1e9))

    def submit(self, asked: RouterRequest) -> Ticket:
        return self.traced.submit(asked, self.ears, self._metrics.request("m", choices=asked.n, prompt_tokens=len(asked.prompt_ids)))

    def _send(self, peer: bytes, message: ToReplica) -> bool:
        self.sent.append(message)
        return True

    def submits(self) -> list[Submit]:
        self.dispatch.pump()
        found = [message for message in self.sent if isinstance(message, Submit)]
        self.sent.clear()
        return found

    def hear(self, place: str, message: Any) -> None:
        self.dispatch.hear(place.encode(), "", message, messages.encode(message))

    def join(self, name: str) -> None:
        """Replica ``name`` says :func:`hello_of`."""
        self.hear(name, hello_of(name))

    def spans(self) -> dict[str, ReadableSpan]:
        found = {span.name: span for span in self.kept.get_finished_spans()}
        assert len(found) == len(self.kept.get_finished_spans()), "names repeat: ask by parent"
        return found
