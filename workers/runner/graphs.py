"""Steps as captured programs: one for each of a few sizes, replayed for every smaller step.

Owns the programs and the memory that they share. Must never know what a program computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from workers.runner.device import Device

#: Rows of decode steps: padding costs at most 7 rows, whose weights are read anyway, 15 from 128 on, and 31 from 256 on, where products
#: are made of tiles of 64 rows and more.
DECODES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 513, 32))
#: Tokens of other steps: up to about 256 padding costs little beside the weights. Longer steps take longer on the device than their
#: launches on the host. 448 is left out: for the widest product of 8B cuBLAS then takes a kernel of half the speed.
MIXED = (32, 64, 128, 192, 256, 320, 384, 512)

#: What to capture, and what to run once before.
Programs = tuple[Callable[[], None], Callable[[], None]]


def graph_sizes(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Those of the rising ``sizes`` that steps of up to ``most`` need; larger steps than the last run without a graph."""
    return sizes[: bisect_left(sizes, most) + 1]


class Graphs:
    """``programs(size)`` for each of ``sizes``. Largest first: the smaller ones then live in its memory."""

    def __init__(self, device: Device, sizes: tuple[int, ...], programs: Callable[[int], Programs]) -> None:
        self._sizes = sizes
        self._programs = {size: device.capture(*programs(size)) for size in reversed(sizes)}

    def size_for(self, least: int) -> int | None:
        """The smallest captured size that is ``least`` or more; None where all are too small."""
        at = bisect_left(self._sizes, least)
        return self._sizes[at] if at < len(self._sizes) else None

    def replay(self, size: int) -> None:
        """Run the program of ``size`` on what its inputs hold when the device gets there."""
        self._programs[size]()

    def close(self) -> None:
        self._programs.clear()
