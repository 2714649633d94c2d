"""Prometheus series of one router: prefix ``trireme_``, vLLM's suffixes, labels ``model_name`` and ``replica``.

Owns the counters of what passed the doors; what replicas report is read from the dispatcher at each scrape, so nothing is counted twice.
The token path only adds to integers: all text is made at the scrape. Labels come from configuration and fixed lists alone, never from a
request, so the number of series is bounded whatever clients send.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from workers.wire import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Seconds. The first bucket is 1 ms, for a queue that is empty and a model that is small.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

REASONS = ("stop", "length", "cancelled")
#: Codes that get a series of their own; any other is counted as ``other``.
CODES = (
    "invalid_request", "invalid_schema", "context_length_exceeded", "model_not_found", "not_found", "method_not_allowed", "body_too_large",
    "unsupported", "authentication_error", "overloaded", "unavailable", "deadline_exceeded", "cancelled", "replica_lost", "engine_fault",
    "nan_logits", "internal_error", "other",
)  # fmt: skip
STATES = ("ready", "draining", "lost")

#: Per replica: key in the dispatcher's status, metric name, help, whether it only grows.
_REPLICA_SERIES = (
    ("running", "num_requests_running", "Rows in the running batch", False),
    ("waiting", "num_requests_waiting", "Rows waiting at the replica", False),
    ("tok_s", "generation_tokens_per_second", "Output tokens a second, as last reported", False),
    ("step_ms", "step_milliseconds", "Duration of a step, as last reported", False),
    ("num_blocks", "kv_cache_blocks", "Blocks in the KV pool", False),
    ("prompt_tokens_total", "replica_prompt_tokens", "Prompt tokens computed", True),
    ("output_tokens_total", "replica_generation_tokens", "Output tokens generated", True),
    ("prefix_queries_total", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", True),
    ("prefix_hits_total", "prefix_cache_hits", "Prompt tokens found in the prefix cache", True),
    ("preemptions_total", "num_preemptions", "Rows preempted for want of KV blocks", True),
)


class Histogram:
    """Counts per bucket, cumulated only at export."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight

    def cumulated(self) -> list[tuple[str, int]]:
        rows, running = [], 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows


class ModelMeter:
    """Everything counted at the doors for one model."""

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
    """One request's clock, made when it is submitted; it counts from :meth:`admitted` on, so one that is refused leaves no trace here. With
    several choices, an interval runs between deliveries of any of them."""

    __slots__ = ("_choices", "_model", "_prompt_tokens", "_start")

    def __init__(self, model: ModelMeter, choices: int, prompt_tokens: int) -> None:
        self._model, self._choices, self._prompt_tokens = model, choices, prompt_tokens
        self._start = time.monotonic()

    def admitted(self) -> None:
        """The dispatcher took it."""
        self._model.in_flight += 1
        self._model.prompt_tokens += self._prompt_tokens
        self._model.prompt_length.observe(self._prompt_tokens)

    def first(self, count: int, now: float) -> None:
        """Its first ``count`` tokens are delivered, at ``now`` of the monotonic clock."""
        self._model.generation_tokens += count
        self._model.first_token.observe(now - self._start)

    def tokens(self, rows: int, count: int, spent: float) -> None:
        """``rows`` requests of its model, this one among them, got ``count`` tokens each, ``spent`` seconds after their last."""
        model = self._model
        model.generation_tokens += rows * count
        model.inter_token.observe(spent / count, rows * count)

    def ended(self, reason: str, usage: Usage) -> None:
        self._model.success[reason] += 1
        self._model.output_length.observe(usage.output_tokens)
        self._model.cached_tokens += usage.cached_tokens
        self._close(1)

    def failed(self, code: str) -> None:
        self._model.errors[code if code in self._model.errors else "other"] += 1
        self._close(1)

    def left(self) -> None:
        """The caller is gone: whatever was still open counts as cancelled, which is nobody's error."""
        if self._choices > 0:
            self._model.success["cancelled"] += self._choices
            self._close(self._choices)

    def _close(self, choices: int) -> None:
        self._choices -= choices
        if self._choices == 0:
            self._model.in_flight -= 1
            self._model.end_to_end.observe(time.monotonic() - self._start)


class Metrics:
    """All series of one router. ``status`` is the dispatcher's, asked at each scrape.

    Every labelled series exists from the start at 0, so that the first ``rate()`` is right.
    """

    def __init__(self, models: Iterable[str], status: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.models = {name: ModelMeter() for name in models}
        self._status = status
        self._ignored_fields = 0
        self._disconnected = 0
        self._refused = dict.fromkeys(CODES, 0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def request(self, model: str, *, choices: int, prompt_tokens: int) -> RequestMeter:
        return RequestMeter(self.models[model], choices, prompt_tokens)

    def refused(self, code: str) -> None:
        """A request that was answered with an error before it was admitted."""
        self._refused[code if code in self._refused else "other"] += 1

    def ignored_fields(self, count: int) -> None:
        self._ignored_fields += count

    def disconnected(self) -> None:
        self._disconnected += 1

    def render(self) -> bytes:
        return bytes(generate_latest(self._registry))

    def describe(self) -> Iterator[Metric]:
        """Nothing to declare ahead: this collector is the registry's only one, so no name can clash."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._door()
        yield from self._counts()
        yield from self._histograms()
        status = self._status()
        yield from self._core(status)
        yield from _replicas(status)

    def _core(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        queue: Mapping[str, int] = status.get("queue", {})
        queued = GaugeMetricFamily("trireme_router_queued_requests", "Rows waiting at this router for a replica", labels=["model_name"])
        for name in self.models:
            queued.add_metric([name], queue.get(name, 0))
        events = CounterMetricFamily("trireme_router_events", "What the routing core counts: rows, tokens and losses", labels=["event"])
        counts: Mapping[str, int] = status.get("counts", {})
        for event, count in counts.items():
            events.add_metric([event], count)
        yield from (queued, events)

    def _door(self) -> Iterator[Metric]:
        yield CounterMetricFamily("trireme_router_disconnected_clients", "Clients that left before their answer's end", self._disconnected)
        yield CounterMetricFamily("trireme_router_ignored_fields", "Unknown fields in request bodies", self._ignored_fields)
        refused = CounterMetricFamily("trireme_router_refused_requests", "Requests refused before admission", labels=["code"])
        for code, count in self._refused.items():
            refused.add_metric([code], count)
        yield refused

    def _counts(self) -> Iterator[Metric]:
        flight = GaugeMetricFamily("trireme_router_inflight_requests", "Requests admitted and not ended", labels=["model_name"])
        prompt = CounterMetricFamily("trireme_prompt_tokens", "Prompt tokens of admitted requests", labels=["model_name"])
        output = CounterMetricFamily("trireme_generation_tokens", "Output tokens delivered to the doors", labels=["model_name"])
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
            ("time_to_first_token_seconds", "From admission to the first token", lambda meter: meter.first_token),
            ("inter_token_latency_seconds", "Between tokens of one request", lambda meter: meter.inter_token),
            ("e2e_request_latency_seconds", "From admission to the end", lambda meter: meter.end_to_end),
            ("request_prompt_tokens", "Prompt tokens of a request", lambda meter: meter.prompt_length),
            ("request_generation_tokens", "Output tokens of a choice", lambda meter: meter.output_length),
        )
        for name, text, pick in families:
            family = HistogramMetricFamily(f"trireme_{name}", text, labels=["model_name"])
            for model, meter in self.models.items():
                histogram = pick(meter)
                family.add_metric([model], buckets=histogram.cumulated(), sum_value=histogram.total)
            yield family


def _replicas(status: Mapping[str, Any]) -> Iterator[Metric]:
    replicas: list[Mapping[str, Any]] = list(status.get("replicas", ()))
    states = GaugeMetricFamily("trireme_replicas", "Replicas known to this router", labels=["state"])
    for state in STATES:
        states.add_metric([state], sum(str(replica.get("state")).lower() == state for replica in replicas))
    yield states
    for key, name, text, grows in _REPLICA_SERIES:
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        family = kind(f"trireme_{name}", text, labels=["model_name", "replica"])
        for replica in replicas:
            family.add_metric(_labels(replica), float(replica.get(key) or 0))
        yield family
    usage = GaugeMetricFamily("trireme_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", labels=["model_name", "replica"])
    for replica in replicas:
        if blocks := replica.get("num_blocks"):
            usage.add_metric(_labels(replica), 1.0 - float(replica.get("free_blocks") or 0) / float(blocks))
    yield usage


def _labels(replica: Mapping[str, Any]) -> list[str]:
    return [str(replica.get("model", "")), str(replica.get("name", ""))]
