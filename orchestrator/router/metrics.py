"""Prometheus series of one router: prefix ``trireme_``, vLLM's suffixes, labels ``model_name`` and ``replica``.

Owns the counters of the frontends. The state of the routing core and of the replicas is read at each scrape
(:mod:`orchestrator.router.metric_families`), so nothing is counted twice. The token path only adds to integers; all text is made at the
scrape. Labels come from configuration, key files and fixed lists only, never from a request, so the number of series is bounded whatever
clients send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from orchestrator.router import metric_families
from orchestrator.router.core.stats import LATENCY_BUCKETS, TOKEN_BUCKETS, Histogram, ModelStats
from orchestrator.router.key_limits import KeyUsage
from workers.protocol.messages import Usage
from workers.protocol.status import RouterStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REASONS = ("stop", "length", "cancelled")
#: Error codes with a series of their own; every other code is counted as ``other``.
CODES = (
    "invalid_request", "invalid_schema", "context_length_exceeded", "model_not_found", "not_found", "method_not_allowed", "body_too_large",
    "unsupported", "authentication_error", "overloaded", "tenant_limit", "rate_limit_exceeded", "unavailable", "deadline_exceeded",
    "cancelled", "replica_lost", "engine_fault", "nan_logits", "internal_error", "other",
)  # fmt: skip


def _nothing() -> RouterStatus:
    """The status of no router."""
    return RouterStatus(router="")


class ModelMeter:
    """Everything that the frontends count for one model."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cached_tokens = 0
        self.success = dict.fromkeys(REASONS, 0)
        self.errors = dict.fromkeys(CODES, 0)
        self.first_token = Histogram(LATENCY_BUCKETS)
        self.inter_token = Histogram(LATENCY_BUCKETS)
        self.end_to_end = Histogram(LATENCY_BUCKETS)
        self.prompt_length = Histogram(TOKEN_BUCKETS)
        self.output_length = Histogram(TOKEN_BUCKETS)


class RequestMeter:
    """Counts and times one request. Made when the request is submitted, it counts from :meth:`admitted` on, so a refused request is not
    counted here. With several choices, an interval is the time between two deliveries to any of them."""

    __slots__ = ("_choices", "_model", "_prompt_tokens", "_start")

    def __init__(self, model: ModelMeter, choices: int, prompt_tokens: int) -> None:
        self._model, self._choices, self._prompt_tokens = model, choices, prompt_tokens
        self._start = time.monotonic()

    def admitted(self) -> None:
        """The dispatcher has accepted the request."""
        self._model.in_flight += 1
        self._model.prompt_tokens += self._prompt_tokens
        self._model.prompt_length.observe(self._prompt_tokens)

    def first(self, count: int, now: float) -> None:
        """The first ``count`` tokens are delivered at ``now`` (monotonic seconds)."""
        self._model.generation_tokens += count
        self._model.first_token.observe(now - self._start)

    def tokens(self, choices: int, count: int, spent: float) -> None:
        """``choices`` choices of the model got ``count`` tokens each, ``spent`` seconds after their last tokens."""
        model = self._model
        model.generation_tokens += choices * count
        model.inter_token.observe(spent / count, choices * count)

    def ended(self, reason: str, usage: Usage) -> None:
        self._model.success[reason] += 1
        self._model.output_length.observe(usage.output_tokens)
        self._model.cached_tokens += usage.cached_tokens
        self._close(1)

    def failed(self, code: str) -> None:
        self._model.errors[code if code in self._model.errors else "other"] += 1
        self._close(1)

    def left(self) -> None:
        """The caller is gone. Its open choices count as cancelled, which is no error."""
        if self._choices > 0:
            self._model.success["cancelled"] += self._choices
            self._close(self._choices)

    def _close(self, choices: int) -> None:
        self._choices -= choices
        if self._choices == 0:
            self._model.in_flight -= 1
            self._model.end_to_end.observe(time.monotonic() - self._start)


class Metrics:
    """All series of one router. ``status`` is the dispatcher's method, called at each scrape; ``stats`` is counted by the routing core.
    ``usage``: of API keys, read at each scrape. ``lag``: how late the event loop woke the ticker of the router process, seconds.

    Every labelled series exists from the start at 0, so that the first ``rate()`` is right.
    """

    def __init__(
        self, models: Iterable[str], status: Callable[[], RouterStatus] = _nothing, stats: Mapping[str, ModelStats] | None = None,
        usage: Callable[[], list[KeyUsage]] = list,
    ) -> None:  # fmt: skip
        self.models = {name: ModelMeter() for name in models}
        self.lag = Histogram(metric_families.LAG_BUCKETS)
        self._status, self._usage = status, usage
        self._stats = stats if stats is not None else {name: ModelStats() for name in self.models}
        self._ignored_fields = 0
        self._disconnected = 0
        self._refused = dict.fromkeys(CODES, 0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        # CPU, memory and descriptors under the names that every Prometheus client library gives them.
        ProcessCollector(registry=self._registry)

    def request(self, model: str, *, choices: int, prompt_tokens: int) -> RequestMeter:
        return RequestMeter(self.models[model], choices, prompt_tokens)

    def refused(self, code: str) -> None:
        """A request was answered with an error before it was admitted."""
        self._refused[code if code in self._refused else "other"] += 1

    def ignored_fields(self, count: int) -> None:
        self._ignored_fields += count

    def disconnected(self) -> None:
        self._disconnected += 1

    def render(self) -> bytes:
        return bytes(generate_latest(self._registry))

    def describe(self) -> Iterator[Metric]:
        """Declares no names in advance: all names here begin with ``trireme_``, and no other collector of the registry uses the prefix."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._counts()
        yield from self._histograms()
        status = self._status()
        yield from metric_families.core(status, self._stats)
        yield from metric_families.replicas(status, list(self.models))
        yield from metric_families.process(status, self.lag)
        yield from metric_families.api_keys(self._usage())

    def _requests(self) -> Iterator[Metric]:
        yield CounterMetricFamily("trireme_router_disconnected_clients", "Clients that left before their answer's end", self._disconnected)
        yield CounterMetricFamily("trireme_router_ignored_fields", "Unknown fields in request bodies", self._ignored_fields)
        refused = CounterMetricFamily("trireme_router_refused_requests", "Requests refused before admission", labels=["code"])
        for code, count in self._refused.items():
            refused.add_metric([code], count)
        yield refused

    def _counts(self) -> Iterator[Metric]:
        flight = GaugeMetricFamily("trireme_router_inflight_requests", "Requests admitted and not ended", labels=["model_name"])
        prompt = CounterMetricFamily("trireme_prompt_tokens", "Prompt tokens of admitted requests", labels=["model_name"])
        output = CounterMetricFamily("trireme_generation_tokens", "Output tokens delivered to clients", labels=["model_name"])
        cached = CounterMetricFamily("trireme_prompt_tokens_cached", "Prompt tokens found in the prefix cache", labels=["model_name"])
        success = CounterMetricFamily("trireme_request_success", "Choices that ended", labels=["model_name", "finished_reason"])
        errors = CounterMetricFamily("trireme_request_error", "Choices that failed after admission", labels=["model_name", "code"])
        for name, meter in self.models.items():
            flight.add_metric([name], meter.in_flight)
            prompt.add_metric([name], meter.prompt_tokens)
            output.add_metric([name], meter.generation_tokens)
            cached.add_metric([name], meter.cached_tokens)
            for reason, count in meter.success.items():
                success.add_metric([name, reason], count)
            for code, count in meter.errors.items():
                errors.add_metric([name, code], count)
        yield from (flight, prompt, output, cached, success, errors)

    def _histograms(self) -> Iterator[Metric]:
        families: tuple[tuple[str, str, Callable[[ModelMeter], Histogram]], ...] = (
            ("trireme_time_to_first_token_seconds", "From admission to the first token", lambda meter: meter.first_token),
            ("trireme_inter_token_latency_seconds", "Between tokens of one request", lambda meter: meter.inter_token),
            ("trireme_e2e_request_latency_seconds", "From admission to the end", lambda meter: meter.end_to_end),
            ("trireme_request_prompt_tokens", "Prompt tokens of a request", lambda meter: meter.prompt_length),
            ("trireme_request_generation_tokens", "Output tokens of a choice", lambda meter: meter.output_length),
        )
        for name, text, pick in families:
            yield metric_families.histogram(name, text, {model: pick(meter) for model, meter in self.models.items()})
