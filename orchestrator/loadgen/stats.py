"""The results of a run: latencies in histograms of a fixed size, counts, and the sums over them. Pure.

Owns the definition of every metric. All times are seconds inside and milliseconds in the summary. Latencies count from the planned time of
a request, so that a generator that falls behind reports longer latencies, not fewer requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from workers.protocol.errors import printable

#: A bucket's upper end is this many times its lower one: a percentile is off by 0.5 % at most.
_GROWTH = 1.01
_LOG = math.log(_GROWTH)
#: Everything below counts as this, seconds.
_FLOOR = 1e-6
#: Buckets reach from there to 28 hours.
_BUCKETS = 2552
#: Number of error kinds that are counted separately.
_MAX_CODES = 32
Metric = str
METRICS: Mapping[Metric, str] = {
    "ttft": "time to first token",
    "itl": "between tokens",
    "tpot": "per output token",
    "e2e": "whole request",
    "queue": "wait before sending",
}


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of one metric, ms."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class LatencyHistogram:
    """Counts in buckets that grow geometrically; the extremes and the sum are exact."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self._sum = 0.0
        self._min, self._max = math.inf, 0.0

    def add(self, seconds: float) -> None:
        bucket = int(math.log(seconds / _FLOOR) / _LOG) if seconds > _FLOOR else 0
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.count += 1
        self._sum += seconds
        self._min, self._max = min(self._min, seconds), max(self._max, seconds)

    def quantile(self, share: float) -> float:
        """The quantile ``share`` in seconds; 0 without observations."""
        rank = max(1, math.ceil(share * self.count))
        for bucket, count in enumerate(self._counts):
            rank -= count
            if rank <= 0:
                middle: float = _FLOOR * _GROWTH ** (bucket + 0.5)
                return min(max(middle, self._min), self._max)
        return 0.0

    def percentiles(self) -> Percentiles:
        if not self.count:
            return Percentiles(count=0, mean=0.0, min=0.0, p50=0.0, p90=0.0, p95=0.0, p99=0.0, max=0.0)
        p50, p90, p95, p99 = (_ms(self.quantile(share)) for share in (0.5, 0.9, 0.95, 0.99))
        mean = _ms(self._sum / self.count)
        return Percentiles(count=self.count, mean=mean, min=_ms(self._min), p50=p50, p90=p90, p95=p95, p99=p99, max=_ms(self._max))


class RequestSample:
    """One request's clock. ``intended``, then :meth:`sent`, :meth:`piece` for whatever brings tokens, all in seconds of one clock."""

    def __init__(self, intended: float, input: int) -> None:
        self.intended, self.sent_at = intended, intended
        self.first = self.last = 0.0
        self.gaps: list[float] = []
        self.pieces = 0
        #: The server's counts; before they arrive, the planned and received numbers.
        self.prompt_tokens, self.output_tokens, self.cached_tokens = input, 0, 0

    def sent(self, now: float) -> None:
        self.sent_at = now

    def piece(self, now: float) -> None:
        if self.pieces:
            self.gaps.append(now - self.last)
        else:
            self.first = now
        self.last = now
        self.pieces += 1

    def counted(self, prompt: int, output: int, cached: int = 0) -> None:
        self.prompt_tokens, self.output_tokens, self.cached_tokens = prompt, output, cached

    def metrics(self) -> dict[Metric, float]:
        """``itl`` apart, which has many. One token has no time per further token: 0."""
        tokens = self.output_tokens or self.pieces
        per_token = (self.last - self.first) / (tokens - 1) if tokens > 1 else 0.0
        return {
            "ttft": self.first - self.intended,
            "tpot": per_token,
            "e2e": self.last - self.intended,
            "queue": self.sent_at - self.intended,
        }


class Failures(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that ended with one kind of error; ``example``: the first one's words."""

    count: int
    example: str


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests within every objective (ms by figure)."""

    objectives: dict[str, float]
    requests: int
    share: float
    requests_per_s: float


class GeneratorLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of the generator itself. ``late``: delay of its own timers, ms; ``cpu``: cores that it used."""

    late: Percentiles
    cpu: float
    peak_in_flight: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run. ``duration_s``: from the first intended sending to the last end. Rates are over it. ``uncounted``: answers for
    which the server reported no token counts, so that events were counted."""

    sent: int
    succeeded: int
    failed: int
    abandoned: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    uncounted: int
    latency_ms: dict[str, Percentiles]
    errors: dict[str, Failures]
    goodput: Goodput | None
    client: GeneratorLoad


class RunStats:
    """Counts requests as they end. ``objectives``: ms by figure."""

    def __init__(self, objectives: Mapping[Metric, float] | None = None) -> None:
        self._objectives = dict(objectives or {})
        self._histograms = {name: LatencyHistogram() for name in METRICS}
        self.lateness = LatencyHistogram()
        self._errors: dict[str, tuple[int, str]] = {}
        self.sent = self.succeeded = self.failed = self.abandoned = 0
        self.peak = 0
        self._good = self._uncounted = 0
        self._prompt = self._cached = self.output_tokens = 0
        self._begun, self._ended = math.inf, 0.0

    @property
    def over(self) -> int:
        return self.succeeded + self.failed + self.abandoned

    @property
    def in_flight(self) -> int:
        return self.sent - self.over

    def begin(self, intended: float) -> None:
        self.sent += 1
        self._begun = min(self._begun, intended)
        self.peak = max(self.peak, self.in_flight)

    def done(self, sample: RequestSample) -> None:
        metrics = sample.metrics()
        for name, value in metrics.items():
            self._histograms[name].add(max(0.0, value))
        for gap in sample.gaps:
            self._histograms["itl"].add(gap)
        metrics["itl"] = sum(sample.gaps) / len(sample.gaps) if sample.gaps else 0.0
        self._good += all(metrics[name] * 1000.0 <= bound for name, bound in self._objectives.items())
        self._uncounted += not sample.output_tokens
        self._prompt += sample.prompt_tokens
        self._cached += sample.cached_tokens
        self.output_tokens += sample.output_tokens or sample.pieces
        self.succeeded += 1
        self._ended = max(self._ended, sample.last)

    def fail(self, code: str, message: str, now: float) -> None:
        self.failed += 1
        self._ended = max(self._ended, now)
        known = code if code in self._errors or len(self._errors) < _MAX_CODES else "other"
        count, example = self._errors.get(known, (0, printable(message[:300])))
        self._errors[known] = count + 1, example

    def abandon(self, now: float) -> None:
        """The run was ended before this request was."""
        self.abandoned += 1
        self._ended = max(self._ended, now)

    def summary(self, cpu_s: float) -> Summary:
        """``cpu_s``: CPU seconds that the generator used."""
        duration = max(self._ended - self._begun, 0.0) if self.sent else 0.0
        per_s = 1.0 / duration if duration else 0.0
        goodput = None
        if self._objectives:
            share = self._good / self.sent if self.sent else 0.0
            goodput = Goodput(objectives=self._objectives, requests=self._good, share=share, requests_per_s=self._good * per_s)
        return Summary(
            sent=self.sent,
            succeeded=self.succeeded,
            failed=self.failed,
            abandoned=self.abandoned,
            duration_s=duration,
            requests_per_s=self.succeeded * per_s,
            output_tokens_per_s=self.output_tokens * per_s,
            total_tokens_per_s=(self.output_tokens + self._prompt) * per_s,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            output_tokens=self.output_tokens,
            uncounted=self._uncounted,
            latency_ms={name: histogram.percentiles() for name, histogram in self._histograms.items()},
            errors={code: Failures(count=count, example=example) for code, (count, example) in self._errors.items()},
            goodput=goodput,
            client=GeneratorLoad(late=self.lateness.percentiles(), cpu=cpu_s * per_s, peak_in_flight=self.peak),
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 4)
