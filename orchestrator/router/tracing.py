"""OpenTelemetry traces, where a deployment asks for them: a :class:`~orchestrator.router.interfaces.Dispatcher` around the real one.

Owns the story of each traced request from its submission to its last terminal message, and makes all spans of it then, from times that the
routing core noted anyway: nothing is done per token, nothing at all for a request that is not sampled, and without tracing this module is
not even imported. Must never put a prompt, an answer or a token id into a span.

    chat MODEL                      from the door's first look to the last terminal message
    ├─ prepare                      checks, template, tokenizer
    ├─ queue                        waiting at the router for a place
    ├─ replica NAME                 one placement; where it was lost: an error, an event ``failover``, and another queue and replica follow
    │  ├─ prefill                   from Submit to the first token here: the way there, the wait and the prompt at the replica
    │  └─ decode                    from there to the last
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer
from opentelemetry.util.types import AttributeValue

from orchestrator.config.router_spec import TracingSpec
from orchestrator.router import request_context, span_names
from orchestrator.router.core.stats import Attempt
from orchestrator.router.interfaces import Dispatcher, RouterRequest, Ticket, Watcher
from orchestrator.router.metrics import RequestMeter
from workers import __version__
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage

#: Finished spans that may wait for the collector; more are dropped, and counted by the SDK. A request has about seven.
MAX_WAITING, BATCH = 8192, 512
#: Seconds between exports, for each of them, and for the last ones when the router ends.
EXPORT_EVERY_S, EXPORT_S, CLOSE_S = 2.0, 3.0, 3.0


class Traces:
    """Sends spans to ``spec.endpoint``, from a thread of its own."""

    def __init__(self, spec: TracingSpec, router: str) -> None:
        resource = Resource.create({"service.name": "trireme-router", "service.instance.id": router, "service.version": __version__})
        self._provider = TracerProvider(sampler=ParentBasedTraceIdRatio(spec.sample), resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=spec.endpoint, timeout=EXPORT_S)
        every_ms = EXPORT_EVERY_S * 1000.0
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING, max_export_batch_size=BATCH, schedule_delay_millis=every_ms)
        )

    def around(self, inner: Dispatcher) -> TracedDispatcher:
        """What the doors are given in its place."""
        return TracedDispatcher(inner, self._provider.get_tracer("trireme", __version__))

    def close(self) -> None:
        """Send what is left, within :data:`CLOSE_S`: a collector that is away must not keep the router."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


class TracedDispatcher:
    """``clock``: the seconds that the routing core counts in; ``wall``: nanoseconds since 1970."""

    def __init__(
        self, inner: Dispatcher, tracer: Tracer, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], int] = time.time_ns
    ) -> None:
        self._inner, self._tracer, self._clock, self._wall = inner, tracer, clock, wall
        self.model, self.ready, self.status = inner.model, inner.ready, inner.status

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> Ticket:
        """As the real one's. A request that is refused here is a trace of one span."""
        story = _Story(self._tracer, ask, watcher, self._clock, self._wall)
        if not story.sampled:
            return self._inner.submit(ask, watcher, meter)
        try:
            ticket = self._inner.submit(msgspec.structs.replace(ask, emitted=story.emitted, trails=story.trails), story, meter)
        except TriremeError as error:
            story.refused(error)
            raise
        story.ticket = ticket
        return story


class _Story:
    """One traced request: the watcher that the dispatcher knows, and the ticket that the door holds."""

    __slots__ = ("_ask", "_clock", "_ends", "_offset", "_open", "_origin", "_span", "_submitted", "_tracer", "_watcher", "emitted",
                 "on_tokens", "ticket", "trails")  # fmt: skip

    def __init__(self, tracer: Tracer, ask: RouterRequest, watcher: Watcher, clock: Callable[[], float], wall: Callable[[], int]) -> None:
        self._tracer, self._ask, self._watcher, self._clock = tracer, ask, watcher, clock
        self._submitted = clock()
        self._offset = wall() - int(self._submitted * 1e9)
        #: The door's own, so that a token costs what it costs without tracing.
        self.on_tokens: Callable[[int, int, list[int], list[Logprobs] | None], None] = watcher.on_tokens
        #: The core's records of each choice, handed over empty where the door keeps none.
        self.emitted: list[list[int]] = ask.emitted or [[] for _ in range(ask.n)]
        self.trails: list[list[Attempt]] = [[] for _ in range(ask.n)]
        self.ticket: Ticket | None = None
        self._open = set(range(ask.n))
        self._ends: dict[int, tuple[float, str, Usage | None]] = {}
        self._origin = found = request_context.current()
        operation = span_names.CHAT if found is not None and found.chat else span_names.TEXT
        self._span = tracer.start_span(
            f"{operation} {ask.model}",
            context=_parent(found),
            kind=SpanKind.SERVER,
            start_time=self._ns(found.received if found is not None else self._submitted),
            attributes={span_names.OPERATION: operation, span_names.PROVIDER: span_names.PROVIDED_BY, span_names.REQUEST_MODEL: ask.model},
        )

    @property
    def sampled(self) -> bool:
        return self._span.is_recording()

    # --- Watcher

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._watcher.on_prompt(choice, logprobs)

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        self._close(choice, reason, usage)
        self._watcher.on_done(choice, reason, usage, stop_id)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._fail(error)
        self._close(choice, "error", None)
        self._watcher.on_failed(choice, error)

    # --- Ticket

    def cancel(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()
        for choice in sorted(self._open):
            self._close(choice, "cancelled", None)

    def finish(self, choice: int) -> None:
        if self.ticket is not None:
            self.ticket.finish(choice)
        self._close(choice, "stop", None)

    def credit(self, tokens: int) -> None:
        if self.ticket is not None:
            self.ticket.credit(tokens)

    def refused(self, error: TriremeError) -> None:
        """The dispatcher did not take it."""
        self._fail(error)
        self._open.clear()
        self._tell(self._clock())

    # --- spans

    def _fail(self, error: TriremeError) -> None:
        self._span.set_attribute(span_names.ERROR_TYPE, error.code)
        self._span.set_status(Status(StatusCode.ERROR, error.code))

    def _close(self, choice: int, reason: str, usage: Usage | None) -> None:
        if choice in self._open:
            self._open.remove(choice)
            now = self._clock()
            self._ends[choice] = (now, reason, usage)
            if not self._open:
                self._tell(now)

    def _tell(self, now: float) -> None:
        """All is known: make every span."""
        ask, root = self._ask, self._span
        facts: dict[str, AttributeValue] = {
            span_names.RESPONSE_ID: ask.request,
            span_names.REQUEST_MAX_TOKENS: ask.params.max_tokens,
            span_names.REQUEST_CHOICES: ask.n,
            span_names.INPUT_TOKENS: len(ask.prompt_ids),
            span_names.OUTPUT_TOKENS: sum(map(len, self.emitted)),
            span_names.CACHED_TOKENS: max((usage.cached_tokens for _, _, usage in self._ends.values() if usage is not None), default=0),
            span_names.FINISH_REASONS: [reason for _, (_, reason, _) in sorted(self._ends.items())],
        }
        if self._origin is not None:
            facts[span_names.REQUEST_ID] = self._origin.request
            self._child(root, span_names.PREPARE, self._origin.received, self._submitted)
        root.set_attributes(facts)
        for choice, (over, _, _) in sorted(self._ends.items()):
            self._choice(choice, self.trails[choice], over)
        root.end(self._ns(now))

    def _choice(self, choice: int, trail: Sequence[Attempt], over: float) -> None:
        mark: dict[str, AttributeValue] = {span_names.CHOICE: choice} if self._ask.n > 1 else {}
        for index, place in enumerate(trail):
            self._child(self._span, span_names.QUEUE, place.queued_at, place.sent_at, {span_names.DECISION: place.reason} | mark)
            end = place.over_at or over
            held = trail[index + 1].held if index + 1 < len(trail) else len(self.emitted[choice])
            self._placement(place, end, held - place.held, mark)
        if not trail or trail[-1].cause:
            self._child(self._span, span_names.QUEUE, trail[-1].over_at if trail else self._submitted, over, mark)

    def _placement(self, place: Attempt, end: float, tokens: int, mark: dict[str, AttributeValue]) -> None:
        facts: dict[str, AttributeValue] = mark | {
            span_names.REPLICA: place.replica, span_names.EPOCH: place.epoch, span_names.ATTEMPT: place.attempt, span_names.NEW_TOKENS:
            place.tokens, span_names.EXPECTED_WAIT: place.expected_s, span_names.TOKENS: tokens,
        }  # fmt: skip
        if place.cached is not None:
            facts[span_names.EXPECTED_CACHED] = place.cached
        span = self._start(self._span, f"replica {place.replica}", place.sent_at, facts, SpanKind.CLIENT)
        if place.first_at:
            self._child(span, span_names.PREFILL, place.sent_at, place.first_at)
            self._child(span, span_names.DECODE, place.first_at, end, {span_names.TOKENS: tokens})
        if place.cause:
            span.add_event(span_names.FAILOVER, {span_names.CAUSE: place.cause}, self._ns(end))
            span.set_status(Status(StatusCode.ERROR, place.cause))
        span.end(self._ns(end))

    def _child(self, parent: Span, name: str, start: float, end: float, facts: dict[str, AttributeValue] | None = None) -> None:
        self._start(parent, name, start, facts, SpanKind.INTERNAL).end(self._ns(end))

    def _start(self, parent: Span, name: str, start: float, facts: dict[str, AttributeValue] | None, kind: SpanKind) -> Span:
        context = trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, kind=kind, start_time=self._ns(start), attributes=facts)

    def _ns(self, moment: float) -> int:
        return self._offset + int(moment * 1e9)


def _parent(found: request_context.Origin | None) -> Context:
    """The caller's span, or none: never whatever this process happens to have."""
    if found is None or found.trace is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if found.trace.sampled else TraceFlags.DEFAULT)
    caller = SpanContext(int(found.trace.id, 16), int(found.trace.span, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(NonRecordingSpan(caller), Context())
