"""The settings of a run, checked, and the requests that follow from them. Pure.

Owns the meaning of `trireme bench`'s flags. The same settings, with the same trace, plan the same requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from orchestrator.loadgen.schedule import ContextLimit, PlannedRequest, Range, arrivals, records, replayed, synthetic
from orchestrator.loadgen.stats import METRICS
from workers.protocol.errors import Rejected
from workers.protocol.messages import ApiEndpoint

#: Lengths of requests without --input-len and --output-len, tokens.
INPUT, OUTPUT = "512", "128"


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``target``: where the load goes, in words. ``concurrency``: in flight, or in an open loop at most. ``input_len``, ``output_len``:
    ``N`` or ``A:B``, empty with a trace. ``trace``: a file's name. ``full``: answers have the requested length, even if the model would end
    earlier. ``words``: prompts as text. ``objectives``: ms by figure."""

    target: str
    concurrency: int
    model: str = ""
    endpoint: ApiEndpoint = "completions"
    rate: float | None = None
    burstiness: float = 1.0
    requests: int | None = None
    duration_s: float | None = None
    input_len: str = ""
    output_len: str = ""
    trace: str = ""
    speed: float = 1.0
    spread_s: float | None = None
    max_len: int | None = None
    seed: int = 0
    words: bool = False
    full: bool = True
    temperature: float = 0.0
    warmup: int = 0
    timeout_s: float = 600.0
    objectives: dict[str, float] = {}

    @property
    def open(self) -> bool:
        return self.rate is not None or bool(self.trace)


def check(settings: LoadSettings) -> None:
    """Raises Rejected on flags that exclude each other or are invalid."""
    positive = {
        "--rate": settings.rate, "--burstiness": settings.burstiness, "--duration": settings.duration_s, "--speed": settings.speed,
        "--timeout": settings.timeout_s,
    }  # fmt: skip
    for flag, value in positive.items():
        if value is not None and not 0.0 < value < float("inf"):
            raise Rejected(f"{flag} {value:g} means nothing", hint="it is above 0")
    if settings.spread_s is not None and not 0.0 <= settings.spread_s < float("inf"):
        raise Rejected(f"--spread {settings.spread_s:g} means nothing", hint="it is 0 or more")
    if settings.trace and (settings.rate is not None or settings.input_len or settings.output_len):
        raise Rejected("a trace has its own arrivals and lengths", hint="leave out --rate, --input-len and --output-len, or --trace")
    if not settings.trace and (settings.speed != 1.0 or settings.spread_s is not None):
        raise Rejected("--speed and --spread are about a trace", hint="add --trace FILE")
    _lengths(settings)


def objectives(slo: Iterable[str]) -> dict[str, float]:
    """``ttft:500`` and the like as ms by figure. Raises Rejected."""
    found = {}
    for text in slo:
        figure, _, bound = text.partition(":")
        if figure not in METRICS:
            raise Rejected(f"--slo {text}: no figure is named {figure}", hint=f"use {', '.join(METRICS)}")
        try:
            found[figure] = float(bound)
        except ValueError:
            raise Rejected(f"--slo {text} is not an objective", hint="one is like ttft:500, in milliseconds") from None
    return found


def plan(settings: LoadSettings, context_limit: ContextLimit, lines: Iterable[bytes]) -> Iterator[PlannedRequest]:
    """The run's requests. ``lines``: the trace's. Raises Rejected, for a trace also while it is read."""
    if settings.trace:
        stream = records(lines, settings.trace)
        found = replayed(stream, context_limit, settings.seed, speed=settings.speed, spread_s=settings.spread_s)
    else:
        input, output = _lengths(settings)
        times = arrivals(settings.rate, settings.burstiness, settings.seed) if settings.rate is not None else None
        found = synthetic(input, output, context_limit, settings.seed, times)
    return islice(found, settings.requests)


def warmup(settings: LoadSettings) -> Iterator[PlannedRequest]:
    """Requests of their own before the run, in a closed loop."""
    input, output = _lengths(settings)
    return islice(synthetic(input, output, ContextLimit(settings.max_len), settings.seed), settings.warmup)


def _lengths(settings: LoadSettings) -> tuple[Range, Range]:
    return _range(settings.input_len or INPUT, "--input-len"), _range(settings.output_len or OUTPUT, "--output-len")


def _range(text: str, flag: str) -> Range:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low) < 2**31):
        raise Rejected(f"{flag} {text} is not a length", hint="give tokens: 128, or 64:256")
    return Range(int(low), int(high or low))
