"""The service rate of a model at one router, from which ``retry_after`` and the choice of a replica are computed.

Owns a short window of completions. Pure; time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

#: Completions that the rate is taken from.
WINDOW = 64
#: Bounds of ``retry_after``, seconds.
RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0


class ServiceRateSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state of a :class:`ServiceRate`."""

    ends: list[float]
    output_tokens: float


class ServiceRate:
    """Completions of one model. ``output_tokens``: smoothed length of an answer."""

    __slots__ = ("_ends", "output_tokens")

    def __init__(self, ends: Iterable[float] = (), output_tokens: float = 64.0) -> None:
        self._ends = deque(ends, maxlen=WINDOW)
        self.output_tokens = output_tokens

    def note_end(self, tokens: int, now: float) -> None:
        """A choice has ended after ``tokens`` tokens."""
        self._ends.append(now)
        self.output_tokens += (tokens - self.output_tokens) / 16

    def retry_after(self, waiting: int, now: float) -> float:
        """Seconds until half of ``waiting`` choices are served at the measured rate; the lower bound while nothing was measured."""
        if len(self._ends) < 2:
            return RETRY_MIN_S
        interval = (now - self._ends[0]) / (len(self._ends) - 1)
        return round(min(RETRY_MAX_S, max(RETRY_MIN_S, interval * (waiting + 1) / 2)), 1)

    def snapshot(self) -> ServiceRateSnapshot:
        return ServiceRateSnapshot(ends=list(self._ends), output_tokens=self.output_tokens)
