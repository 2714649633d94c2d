"""The inputs of a step's program: device memory that a submission writes whole or not at all.

Owns the order of its words. A decode program leaves its inputs ready for the next step: positions are one further, and every token is a
placeholder for the slot's last token. So a decode step that repeats the previous one uses these inputs. Must never know of plans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from workers.kernels.step_layout import (
    DeviceLayout,
    Heads,
    LayoutShape,
    Paging,
    aligned,
    decode_shape,
    fill_decode_layout,
    fill_layout,
    view_layout,
)
from workers.scheduler.step_plan import Ints


class StepInputs(NamedTuple):
    """The inputs of a program. ``tokens`` [T] int32, negative = a placeholder; ``picks`` [N] int32: the tokens of the step whose logits are
    needed (None = all T); ``slots`` [N] int32: the slots of their sequences."""

    layout: DeviceLayout
    tokens: Tensor
    picks: Tensor | None
    slots: Tensor


class MixedInputFormat:
    """Inputs of any step of at most ``shape.tokens`` tokens, of which ``sampled_count`` yield one; ``words`` int32 long.

    Padding samples for the slot ``padding_slot``.
    """

    def __init__(self, shape: LayoutShape, sampled_count: int, padding_slot: int) -> None:
        self.shape, self.sampled_count, self._padding_slot = shape, sampled_count, padding_slot
        self._tokens = shape.size
        self._picks = self._tokens + aligned(shape.tokens)
        self._slots = self._picks + aligned(sampled_count)
        self.words = self._slots + aligned(sampled_count)

    def holds(self, other: MixedInputFormat) -> bool:
        """Whether every step that fits ``other`` fits this format."""
        mine, its = self.shape, other.shape
        fits = mine.tokens >= its.tokens and mine.parts >= its.parts and mine.tiles >= its.tiles
        return fits and self.sampled_count >= other.sampled_count

    def views(self, memory: Tensor, paging: Paging) -> StepInputs:
        """Views of the first ``words`` of ``memory`` int32 on the device."""
        layout = view_layout(self.shape, memory[: self._tokens], paging)
        tokens = memory[self._tokens : self._tokens + self.shape.tokens]
        picks, slots = (memory[begin : begin + self.sampled_count] for begin in (self._picks, self._slots))
        return StepInputs(layout, tokens, picks, slots)

    def fill(self, packed: Ints, slots: Ints, starts: Ints, lengths: Ints, tokens: Ints, sampled_indices: np.ndarray, heads: Heads) -> None:
        """Write a step into ``packed`` [words]; columns as in a StepPlan; ``sampled_indices`` [N]: the sequences that yield a token."""
        fill_layout(self.shape, packed[: self._tokens], slots, starts, lengths, heads)
        last_tokens = np.cumsum(lengths)[sampled_indices] - 1
        for begin, size, column, padding in (
            (self._tokens, self.shape.tokens, tokens, 0),
            (self._picks, self.sampled_count, last_tokens, 0),
            (self._slots, self.sampled_count, slots[sampled_indices], self._padding_slot),
        ):
            _put(packed[begin : begin + size], column, padding)


class DecodeInputFormat:
    """Inputs of a step of at most ``size`` sequences that all decode; ``words`` int32 long. Padding decodes in the slot
    ``padding_slot``."""

    def __init__(self, size: int, heads: Heads, padding_slot: int) -> None:
        self._size, self._heads, self._padding_slot = size, heads, padding_slot
        self._shape = decode_shape(size, heads)
        self._tokens = self._shape.size
        self._slots = self._tokens + aligned(size)
        self.words = self._slots + aligned(size)

    def views(self, memory: Tensor, paging: Paging) -> StepInputs:
        """Views of the first ``words`` of ``memory`` int32 on the device."""
        tokens, slots = (memory[begin : begin + self._size] for begin in (self._tokens, self._slots))
        return StepInputs(view_layout(self._shape, memory[: self._tokens], paging), tokens, None, slots)

    def fill(self, packed: Ints, slots: Ints, starts: Ints, tokens: Ints) -> None:
        """Write a step into ``packed`` [words]; columns as in a StepPlan."""
        fill_decode_layout(self._shape, packed[: self._tokens], slots, starts, self._heads)
        _put(packed[self._tokens : self._tokens + self._size], tokens, 0)
        _put(packed[self._slots : self._slots + self._size], slots, self._padding_slot)


def _put(packed: Ints, column: np.ndarray, padding: int) -> None:
    packed[: len(column)], packed[len(column) :] = column, padding
