"""What a plan changes in a rank's tables, and the host's records by which it is known where.

Owns how many blocks each slot has, and which slots want more of sampling than a temperature. Must never touch the device.
"""

from __future__ import annotations

from struct import pack
from typing import NamedTuple

import numpy as np

from workers.kernels.step_layout import SlotOffsets
from workers.runner.slot_sampling import SlotSampling, is_plain
from workers.sampling.definition import seed_keys
from workers.scheduler.step_plan import I32, Ints, StepPlan, view

NONE: Ints = np.zeros(0, I32)


class SlotUpdates(NamedTuple):
    """What the device must learn: ``places`` in :class:`~workers.kernels.step_layout.SlotState`'s words and the ``values`` that they
    get, and the places of tokens that the last stage ``returns``, int32 all."""

    places: Ints = NONE
    values: Ints = NONE
    returns: Ints = NONE

    def cut(self, count: int) -> tuple[SlotUpdates, SlotUpdates]:
        """The first ``count`` places, and the rest."""
        return SlotUpdates(self.places[:count], self.values[:count]), SlotUpdates(self.places[count:], self.values[count:], self.returns)


class SlotRecords:
    """Of a rank with ``slots`` slots, whose tables hold ``width`` blocks each. ``sampling``: of a rank of the last stage, else None."""

    def __init__(self, slots: int, width: int, sampling: SlotSampling | None) -> None:
        self._width, self._sampling = width, sampling
        self._at = SlotOffsets.of(slots, width)
        self._filled = [0] * slots
        #: Slots that want more than a temperature, and how many there are.
        self.special, self.specials = np.zeros(slots, np.bool_), 0

    def take(self, plan: StepPlan) -> SlotUpdates:
        """Take closed and opened slots and appended blocks."""
        opened = SlotUpdates()
        if plan.closed or plan.opened or self.specials:
            closed = view(plan.closed)
            for slot in closed.tolist():
                self._filled[slot] = 0
            if self._sampling is not None:
                opened = self._open(plan, closed, self._sampling)
        if not plan.block_slots:
            return opened
        cells, filled = [], self._filled
        for slot in view(plan.block_slots).tolist():
            cells.append(slot * self._width + filled[slot])
            filled[slot] += 1
        appended = SlotUpdates(np.asarray(cells, I32), view(plan.block_ids))
        if not len(opened.places):
            return appended
        return SlotUpdates(np.concatenate((appended.places, opened.places)), np.concatenate((appended.values, opened.values)))

    def returned(self, slots: Ints) -> Ints:
        """Places of the last tokens of ``slots``."""
        return slots + np.int32(self._at.tokens)

    def _open(self, plan: StepPlan, closed: Ints, sampling: SlotSampling) -> SlotUpdates:
        """Let ``sampling`` know of slots ``closed`` and opened; returns seeds and temperatures of these."""
        for slot in closed[self.special[closed]].tolist():
            sampling.close(slot)
            self.specials -= 1
        self.special[closed] = False
        places: list[int] = []
        values = b""
        for opened in plan.opened:
            slot, seeds = opened.slot, self._at.seeds + 2 * opened.slot
            places += (seeds, seeds + 1, self._at.temperatures + slot)
            values += pack("<IIf", *seed_keys(opened.params.seed), opened.params.temperature)
            self.special[slot] = special = not is_plain(opened.params)
            if special:
                sampling.open(opened)
                self.specials += 1
        if self.specials:
            sampling.follow(plan)
        return SlotUpdates(np.asarray(places, I32), view(values))
