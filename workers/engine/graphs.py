"""Decode steps as captured programs: one for each of a few row counts, replayed for every count up to it.

Owns the programs and the memory that they share. Must never know what a program computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from workers.engine.device import Device

#: Row counts of the programs: padding costs at most 7 rows, whose weights are read anyway.
SIZES = (1, 2, 4, *range(8, 513, 8))


def graph_sizes(rows: int) -> tuple[int, ...]:
    """The sizes that steps of up to ``rows`` rows need, rising; larger steps than the last run without a graph."""
    return SIZES[: bisect_left(SIZES, rows) + 1]


class Graphs:
    """``programs(size)`` gives what to capture for ``size`` rows, and what to run once before. Largest first: the smaller ones then live in
    its memory."""

    def __init__(
        self, device: Device, sizes: tuple[int, ...], programs: Callable[[int], tuple[Callable[[], None], Callable[[], None]]]
    ) -> None:
        self._sizes = sizes
        self._programs = {size: device.capture(*programs(size)) for size in reversed(sizes)}

    def size_for(self, rows: int) -> int | None:
        """The smallest captured size that holds ``rows``; None where all are too small."""
        at = bisect_left(self._sizes, rows)
        return self._sizes[at] if at < len(self._sizes) else None

    def replay(self, size: int) -> None:
        """Run the program of ``size`` on what its inputs hold when the device gets there."""
        self._programs[size]()

    def close(self) -> None:
        self._programs.clear()
