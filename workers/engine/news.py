"""What a plan changes in a rank's tables, and the host's records by which it is known where.

Owns how many blocks each slot has, and which slots want more of sampling than a temperature. Must never touch the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from workers.core.params import seed_keys
from workers.core.plan import F32, I32, Ints, StepPlan, view
from workers.engine.sampling import Sampling, is_plain

NONE: Ints = np.zeros(0, I32)


class News(NamedTuple):
    """What the device must learn, as one int32 row after the other: ``cells`` of the block tables, counted through all of them, and their
    ``blocks``; ``opened`` slots, two words of their seeds, bits of their temperatures; slots whose token the last stage ``returns``."""

    cells: Ints = NONE
    blocks: Ints = NONE
    opened: Ints = NONE
    returns: Ints = NONE

    @property
    def words(self) -> int:
        return 2 * len(self.cells) + len(self.opened) + len(self.returns)


class Records:
    """Of a rank with ``slots`` slots, whose tables hold ``width`` blocks each. ``sampling``: of a rank of the last stage, else None."""

    def __init__(self, slots: int, width: int, sampling: Sampling | None) -> None:
        self._width, self._sampling = width, sampling
        self._filled = [0] * slots
        #: Slots that want more than a temperature, and how many there are.
        self.special, self.specials = np.zeros(slots, np.bool_), 0

    def take(self, plan: StepPlan) -> News:
        """Take closed and opened slots and appended blocks."""
        opened = NONE
        if plan.closed or plan.opened or self.specials:
            closed = view(plan.closed)
            for slot in closed.tolist():
                self._filled[slot] = 0
            if self._sampling is not None:
                opened = self._open(plan, closed, self._sampling)
        if not plan.block_slots:
            return News(opened=opened)
        cells, filled = [], self._filled
        for slot in view(plan.block_slots).tolist():
            cells.append(slot * self._width + filled[slot])
            filled[slot] += 1
        return News(np.asarray(cells, I32), view(plan.block_ids), opened)

    def _open(self, plan: StepPlan, closed: Ints, sampling: Sampling) -> Ints:
        """Let ``sampling`` know of slots ``closed`` and opened; returns ``News.opened``."""
        for slot in closed[self.special[closed]].tolist():
            sampling.close(slot)
            self.specials -= 1
        self.special[closed] = False
        seeds: list[int] = []
        for opened in plan.opened:
            seeds += (opened.slot, *seed_keys(opened.params.seed))
            self.special[opened.slot] = special = not is_plain(opened.params)
            if special:
                sampling.open(opened)
                self.specials += 1
        if self.specials:
            sampling.follow(plan)
        words = np.asarray(seeds, np.int64).astype(np.uint32).view(I32).reshape(-1, 3)
        heat = np.asarray([opened.params.temperature for opened in plan.opened], F32).view(I32)
        return np.concatenate((words, heat[:, None]), 1).T.reshape(-1)
