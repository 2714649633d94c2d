"""OpenTelemetry traces, if a deployment configures them: a :class:`~orchestrator.router.interfaces.Dispatcher` around the real one.

Owns the record of each traced request from its submission to its last terminal message, and makes all its spans then, from times that the
routing core records anyway. Nothing is done per token, nothing at all for a request that is not sampled, and without tracing this module is
not imported. It never puts a prompt, an answer or a token id into a span.

    chat MODEL                      from the arrival at the frontend to the last terminal message
    ├─ prepare                      checks, template, tokenizer
    ├─ queue                        waiting at the router for a replica
    ├─ replica NAME                 one attempt; a lost one has an error and an event ``failover``, and another queue and replica follow
    │  ├─ prefill                   from Submit to the first token: the way to the replica, its queue and the prompt
    │  └─ decode                    from the first token to the last
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
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.stats import Attempt
from orchestrator.router.interfaces import Dispatcher, Ticket, Watcher
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

    def around(self, inner: Dispatcher, clock: Callable[[], float]) -> TracedDispatcher:
        """The dispatcher that the frontends use in place of ``inner``, which counts time by ``clock``."""
        return TracedDispatcher(inner, self._provider.get_tracer("trireme", __version__), clock=clock)

    def close(self) -> None:
        """Send the remaining spans within :data:`CLOSE_S`, so that an unreachable collector does not keep the router from ending."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


class TracedDispatcher:
    """``clock``: seconds, as the routing core counts them; ``wall``: nanoseconds since 1970."""

    def __init__(
        self, inner: Dispatcher, tracer: Tracer, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], int] = time.time_ns
    ) -> None:
        self._inner, self._tracer, self._clock, self._wall = inner, tracer, clock, wall
        self.model, self.ready, self.status = inner.model, inner.ready, inner.status

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> Ticket:
        """As the inner dispatcher's. A request that is refused here becomes a trace of one span."""
        traced = _TracedRequest(self._tracer, ask, watcher, self._clock, self._wall)
        if not traced.sampled:
            return self._inner.submit(ask, watcher, meter)
        try:
            ticket = self._inner.submit(msgspec.structs.replace(ask, emitted=traced.emitted, attempts=traced.attempts), traced, meter)
        except TriremeError as error:
            traced.refused(error)
            raise
        return _TracedTicket(ticket, traced)


class _TracedRequest:
    """One traced request: the watcher that the inner dispatcher gets."""

    __slots__ = (
        "_ask",
        "_clock",
        "_context",
        "_ends",
        "_offset",
        "_open",
        "_received",
        "_span",
        "_submitted",
        "_tracer",
        "_watcher",
        "attempts",
        "emitted",
        "on_tokens",
    )  # fmt: skip

    def __init__(self, tracer: Tracer, ask: RouterRequest, watcher: Watcher, clock: Callable[[], float], wall: Callable[[], int]) -> None:
        self._tracer, self._ask, self._watcher, self._clock = tracer, ask, watcher, clock
        self._submitted = clock()
        self._offset = wall() - int(self._submitted * 1e9)
        #: The frontend's own method, so that a token costs what it costs without tracing.
        self.on_tokens: Callable[[int, int, list[int], list[Logprobs] | None], None] = watcher.on_tokens
        #: The core's records of each choice, empty where the frontend keeps none.
        self.emitted: list[list[int]] = ask.emitted or [[] for _ in range(ask.n)]
        self.attempts: list[list[Attempt]] = [[] for _ in range(ask.n)]
        self._open = set(range(ask.n))
        self._ends: dict[int, tuple[float, str, Usage | None]] = {}
        self._context = context = request_context.current()
        #: When it arrived, by the core's clock: the request context counts by another one.
        self._received = self._submitted - (time.monotonic() - context.received) if context is not None else self._submitted
        operation = span_names.CHAT if context is not None and context.chat else span_names.TEXT
        self._span = tracer.start_span(
            f"{operation} {ask.model}",
            context=_parent(context),
            kind=SpanKind.SERVER,
            start_time=self._ns(self._received),
            attributes={span_names.OPERATION: operation, span_names.PROVIDER: span_names.PROVIDED_BY, span_names.REQUEST_MODEL: ask.model},
        )

    @property
    def sampled(self) -> bool:
        return self._span.is_recording()

    # --- Watcher

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._watcher.on_prompt(choice, logprobs)

    def on_cached(self, choice: int, tokens: int) -> None:
        self._watcher.on_cached(choice, tokens)

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        self.ended(choice, reason, usage)
        self._watcher.on_done(choice, reason, usage, stop_id)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._fail(error)
        self.ended(choice, "error", None)
        self._watcher.on_failed(choice, error)

    # --- ends that the frontend decides

    def refused(self, error: TriremeError) -> None:
        """The inner dispatcher did not accept the request."""
        self._fail(error)
        self._open.clear()
        self._make_spans(self._clock())

    def cancelled(self) -> None:
        for choice in sorted(self._open):
            self.ended(choice, "cancelled", None)

    def ended(self, choice: int, reason: str, usage: Usage | None) -> None:
        """Only the first end of a choice counts."""
        if choice in self._open:
            self._open.remove(choice)
            now = self._clock()
            self._ends[choice] = (now, reason, usage)
            if not self._open:
                self._make_spans(now)

    # --- spans

    def _fail(self, error: TriremeError) -> None:
        self._span.set_attribute(span_names.ERROR_TYPE, error.code)
        self._span.set_status(Status(StatusCode.ERROR, error.code))

    def _make_spans(self, now: float) -> None:
        """Make every span, now that all of them are known."""
        ask, root = self._ask, self._span
        facts: dict[str, AttributeValue] = {
            span_names.RESPONSE_ID: ask.request_id,
            span_names.REQUEST_MAX_TOKENS: ask.params.max_tokens,
            span_names.REQUEST_CHOICES: ask.n,
            span_names.INPUT_TOKENS: len(ask.prompt_ids),
            span_names.OUTPUT_TOKENS: sum(map(len, self.emitted)),
            span_names.CACHED_TOKENS: max((usage.cached_tokens for _, _, usage in self._ends.values() if usage is not None), default=0),
            span_names.FINISH_REASONS: [reason for _, (_, reason, _) in sorted(self._ends.items())],
        }
        if self._context is not None:
            facts[span_names.REQUEST_ID] = self._context.request_id
            self._child(root, span_names.PREPARE, self._received, self._submitted)
        root.set_attributes(facts)
        for choice, (over, _, _) in sorted(self._ends.items()):
            self._choice(choice, self.attempts[choice], over)
        root.end(self._ns(now))

    def _choice(self, choice: int, attempts: Sequence[Attempt], over: float) -> None:
        mark: dict[str, AttributeValue] = {span_names.CHOICE: choice} if self._ask.n > 1 else {}
        for index, attempt in enumerate(attempts):
            self._child(
                self._span, span_names.QUEUE, attempt.queued_at, attempt.sent_at, {span_names.DECISION: attempt.placed_because} | mark
            )
            end = attempt.ended_at or over
            tokens = attempts[index + 1].emitted_before if index + 1 < len(attempts) else len(self.emitted[choice])
            self._attempt(attempt, end, tokens - attempt.emitted_before, mark)
        if not attempts or attempts[-1].cause:
            self._child(self._span, span_names.QUEUE, attempts[-1].ended_at if attempts else self._submitted, over, mark)

    def _attempt(self, attempt: Attempt, end: float, tokens: int, mark: dict[str, AttributeValue]) -> None:
        facts: dict[str, AttributeValue] = mark | {
            span_names.REPLICA: attempt.replica, span_names.EPOCH: attempt.epoch, span_names.ATTEMPT: attempt.number,
            span_names.NEW_TOKENS: attempt.tokens, span_names.EXPECTED_WAIT: attempt.expected_s, span_names.TOKENS: tokens,
        }  # fmt: skip
        if attempt.cached is not None:
            facts[span_names.EXPECTED_CACHED] = attempt.cached
        span = self._start(self._span, f"replica {attempt.replica}", attempt.sent_at, facts, SpanKind.CLIENT)
        if attempt.first_at:
            self._child(span, span_names.PREFILL, attempt.sent_at, attempt.first_at)
            self._child(span, span_names.DECODE, attempt.first_at, end, {span_names.TOKENS: tokens})
        if attempt.cause:
            span.add_event(span_names.FAILOVER, {span_names.CAUSE: attempt.cause}, self._ns(end))
            span.set_status(Status(StatusCode.ERROR, attempt.cause))
        span.end(self._ns(end))

    def _child(self, parent: Span, name: str, start: float, end: float, facts: dict[str, AttributeValue] | None = None) -> None:
        self._start(parent, name, start, facts, SpanKind.INTERNAL).end(self._ns(end))

    def _start(self, parent: Span, name: str, start: float, facts: dict[str, AttributeValue] | None, kind: SpanKind) -> Span:
        context = trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, kind=kind, start_time=self._ns(start), attributes=facts)

    def _ns(self, moment: float) -> int:
        return self._offset + int(moment * 1e9)


class _TracedTicket:
    """The ticket of a traced request."""

    __slots__ = ("_ticket", "_traced")

    def __init__(self, ticket: Ticket, traced: _TracedRequest) -> None:
        self._ticket, self._traced = ticket, traced

    def cancel(self) -> None:
        self._ticket.cancel()
        self._traced.cancelled()

    def stop_choice(self, choice: int) -> None:
        self._ticket.stop_choice(choice)
        self._traced.ended(choice, "stop", None)

    def credit(self, tokens: int) -> None:
        self._ticket.credit(tokens)


def _parent(context: request_context.RequestContext | None) -> Context:
    """The caller's span as the parent, or an empty context, which has none."""
    if context is None or context.trace is None:
        return Context()
    caller = context.trace
    flags = TraceFlags(TraceFlags.SAMPLED if caller.sampled else TraceFlags.DEFAULT)
    span = SpanContext(int(caller.id, 16), int(caller.span, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(NonRecordingSpan(span), Context())
