"""Times and lengths of requests. Pure: it reads seeds and lines, and yields planned requests one at a time.

Owns the arrival processes, the reading of traces, and the cutting of lengths to a model's context. Never reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import msgspec
import numpy as np

from workers.protocol.errors import Rejected

#: Tokens for each id in a trace's ``hash_ids``.
BLOCK = 512
#: Mooncake's traces round arrivals to this, seconds.
QUANTUM_S = 3.0
#: Records that decide whether a trace's arrivals are rounded.
_ROUNDING_SAMPLE = 256
_CHUNK = 1024


class PlannedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A planned request. ``at``: seconds after the start, None = as soon as there is room. ``input``, ``output``: tokens. ``blocks``: ids
    of the prompt's blocks of :data:`BLOCK` tokens, equal ids are equal text; empty = a unique prompt."""

    index: int
    input: int
    output: int
    at: float | None = None
    blocks: tuple[int, ...] = ()


class Range(msgspec.Struct, frozen=True):
    """A uniform distribution of whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def draw(self, generator: np.random.Generator) -> int:
        return self.low if self.low == self.high else int(generator.integers(self.low, self.high + 1))


class TraceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a trace. ``timestamp`` in ms; ``hash_ids`` name the prompt's blocks, the last of which may be partial."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None


class ContextLimit:
    """Cuts lengths to a context of ``limit`` tokens (None = any), and counts the removed tokens."""

    def __init__(self, limit: int | None) -> None:
        if limit is not None and limit < 2:
            raise Rejected(f"a context of {limit} tokens holds no request", hint="use --max-len 2 or more")
        self._limit = limit
        self.requests = self.input_tokens = self.output_tokens = 0

    def fit(self, input: int, output: int) -> tuple[int, int]:
        """The answer keeps up to half of the context, the prompt the rest of it."""
        if self._limit is None or input + output <= self._limit:
            return input, output
        output_kept = min(output, max(self._limit // 2, self._limit - input))
        input_kept = min(input, self._limit - output_kept)
        self.requests += 1
        self.input_tokens += input - input_kept
        self.output_tokens += output - output_kept
        return input_kept, output_kept


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds of arrivals at ``rate`` a second: gaps drawn from a gamma distribution of shape ``burstiness``. 1 is Poisson; less comes in
    bursts, more is steadier."""
    generator = np.random.default_rng([seed, 1])
    now = 0.0
    while True:
        for gap in generator.gamma(burstiness, 1.0 / (rate * burstiness), _CHUNK):
            now += float(gap)
            yield now


def synthetic(
    input: Range, output: Range, context_limit: ContextLimit, seed: int, times: Iterable[float] | None = None
) -> Iterator[PlannedRequest]:
    """An endless series of requests with random lengths; ``times`` None: each as soon as there is room."""
    generator = np.random.default_rng([seed, 2])
    clock: Iterator[float | None] = iter(times) if times is not None else iter(lambda: None, 0)
    for index, at in enumerate(clock):
        input_kept, output_kept = context_limit.fit(input.draw(generator), output.draw(generator))
        yield PlannedRequest(index=index, input=input_kept, output=output_kept, at=at)


def replayed(
    records: Iterable[TraceRecord], context_limit: ContextLimit, seed: int, *, speed: float = 1.0, spread_s: float | None = None
) -> Iterator[PlannedRequest]:
    """A trace's requests, ``speed`` times as fast. ``spread_s``: how far requests of one timestamp are spread, uniformly; None = by
    :data:`QUANTUM_S` where the trace is rounded. Raises Rejected where timestamps go back."""
    stream = iter(records)
    seen = list(islice(stream, _ROUNDING_SAMPLE))
    if not seen:
        raise Rejected("the trace is empty")
    width = spread_s if spread_s is not None else QUANTUM_S if _rounded(seen) else 0.0
    generator = np.random.default_rng([seed, 3])
    index, begun, last = 0, seen[0].timestamp, 0.0
    for group in _groups(chain(seen, stream)):
        start = (group[0].timestamp - begun) / 1000.0
        offsets = np.sort(generator.uniform(0.0, width, len(group))) if width else np.zeros(len(group))
        for record, offset in zip(group, offsets, strict=True):
            last = max(last, start + float(offset))
            input_kept, output_kept = context_limit.fit(record.input_length, record.output_length)
            blocks = tuple(record.hash_ids or ())[: -(-input_kept // BLOCK)]
            yield PlannedRequest(index=index, input=input_kept, output=output_kept, at=last / speed, blocks=blocks)
            index += 1


def records(lines: Iterable[bytes], name: str) -> Iterator[TraceRecord]:
    """Decode a trace's lines, empty ones left out. Raises Rejected that names file and line."""
    decode = msgspec.json.Decoder(TraceRecord).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = decode(line)
        except msgspec.DecodeError as error:
            raise Rejected(f"{name}:{number} is not a request of a trace", str(error)) from None
        if record.input_length < 1 or record.output_length < 1:
            raise Rejected(f"{name}:{number} is not a request of a trace", "a length is below 1")
        yield record


def _rounded(seen: list[TraceRecord]) -> bool:
    """Block ids come with Mooncake's traces; where many of these share a timestamp, arrivals were rounded."""
    return seen[0].hash_ids is not None and len({record.timestamp for record in seen}) <= len(seen) // 2


def _groups(stream: Iterable[TraceRecord]) -> Iterator[list[TraceRecord]]:
    """Consecutive records of one timestamp."""
    group: list[TraceRecord] = []
    for record in stream:
        if group and record.timestamp < group[0].timestamp:
            raise Rejected("the trace's timestamps go back", f"{record.timestamp:g} ms after {group[0].timestamp:g} ms", "sort it by time")
        if group and record.timestamp != group[0].timestamp:
            yield group
            group = []
        group.append(record)
    yield group
