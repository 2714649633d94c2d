"""The changes of a plan to the device's state of the slots, and the host's records from which they are computed.

Owns the number of blocks of each slot, and the set of slots that need the torch sampler. Must never access the device.
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
    """Writes to the words of :class:`~workers.kernels.step_layout.SlotState`, all int32.

    The words at ``indices`` [n] get ``values`` [n]; the words at ``returned`` [m] get the tokens that the last stage returns to the first
    one.
    """

    indices: Ints = NONE
    values: Ints = NONE
    returned: Ints = NONE

    def split(self, count: int) -> tuple[SlotUpdates, SlotUpdates]:
        """The first ``count`` indices and values; and the rest, with all returned tokens."""
        return SlotUpdates(self.indices[:count], self.values[:count]), SlotUpdates(self.indices[count:], self.values[count:], self.returned)


class SlotRecords:
    """The host's records of ``slots`` slots, whose block tables are ``width`` blocks wide. ``sampling``: on a rank of the last stage."""

    def __init__(self, slots: int, width: int, sampling: SlotSampling | None) -> None:
        self._width, self._sampling = width, sampling
        self._offsets = SlotOffsets.of(slots, width)
        self._filled = [0] * slots
        #: [slots] bool: slots whose sequences need the torch sampler; and their number.
        self.needs_torch, self.torch_count = np.zeros(slots, np.bool_), 0

    def apply(self, plan: StepPlan) -> SlotUpdates:
        """Record closed slots, opened slots and appended blocks; returns what the device must write."""
        opened = SlotUpdates()
        if plan.closed or plan.opened or self.torch_count:
            closed = view(plan.closed)
            for slot in closed.tolist():
                self._filled[slot] = 0
            if self._sampling is not None:
                opened = self._apply_sampling(plan, closed, self._sampling)
        if not plan.block_slots:
            return opened
        cells, filled = [], self._filled
        for slot in view(plan.block_slots).tolist():
            cells.append(slot * self._width + filled[slot])
            filled[slot] += 1
        appended = SlotUpdates(np.asarray(cells, I32), view(plan.block_ids))
        if not len(opened.indices):
            return appended
        return SlotUpdates(np.concatenate((appended.indices, opened.indices)), np.concatenate((appended.values, opened.values)))

    def token_indices(self, slots: Ints) -> Ints:
        """Word indices of the last tokens of ``slots`` [n]; [n] int32."""
        return slots + np.int32(self._offsets.tokens)

    def _apply_sampling(self, plan: StepPlan, closed: Ints, sampling: SlotSampling) -> SlotUpdates:
        """Pass closed and opened slots on to ``sampling`` if they need it; returns the seeds and temperatures of the opened ones."""
        for slot in closed[self.needs_torch[closed]].tolist():
            sampling.close(slot)
            self.torch_count -= 1
        self.needs_torch[closed] = False
        indices: list[int] = []
        values = b""
        for opened in plan.opened:
            slot, seeds = opened.slot, self._offsets.seeds + 2 * opened.slot
            indices += (seeds, seeds + 1, self._offsets.temperatures + slot)
            values += pack("<IIf", *seed_keys(opened.params.seed), opened.params.temperature)
            self.needs_torch[slot] = needs_torch = not is_plain(opened.params)
            if needs_torch:
                sampling.open(opened)
                self.torch_count += 1
        if self.torch_count:
            sampling.append_tokens(plan)
        return SlotUpdates(np.asarray(indices, I32), view(values))
