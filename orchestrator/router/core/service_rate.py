"""How fast a model's rows are served, as seen from one router: what ``retry_after`` and the choice of a replica are computed from.

Owns a short window of completions. Pure; time is an argument.
"""

from __future__ import annotations

from collections import deque

WINDOW = 64
#: Bounds of ``retry_after``, seconds.
RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0


class ServiceRate:
    """Completions of one model. ``output_tokens``: smoothed length of an answer."""

    __slots__ = ("_ends", "output_tokens")

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=WINDOW)
        self.output_tokens = 64.0

    def ended(self, tokens: int, now: float) -> None:
        self._ends.append(now)
        self.output_tokens += (tokens - self.output_tokens) / 16

    def retry_after(self, waiting: int, now: float) -> float:
        """Seconds until half of ``waiting`` rows are served at the measured rate; the lower bound while nothing was measured."""
        if len(self._ends) < 2:
            return RETRY_MIN_S
        per_row = (now - self._ends[0]) / (len(self._ends) - 1)
        return round(min(RETRY_MAX_S, max(RETRY_MIN_S, per_row * (waiting + 1) / 2)), 1)
