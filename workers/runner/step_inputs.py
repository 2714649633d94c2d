"""What a step's program reads: device memory that is written whole from a submission, or not at all.

Owns the order of its words, and the rule of what a decode program leaves there: positions one further, every token a guess. So what a
decode step has read is what its repetition reads. Must never know of plans.
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
    fill,
    fill_decodes,
)
from workers.kernels.step_layout import view as view_layout
from workers.scheduler.step_plan import Ints


class Inputs(NamedTuple):
    """What a program reads. ``tokens`` [T] int32, perhaps guesses; ``picks`` [S] places of the tokens that yield one (None = all), of
    slots ``slots`` [S]."""

    layout: DeviceLayout
    tokens: Tensor
    picks: Tensor | None
    slots: Tensor


class StepInbox:
    """The inbox of any step of at most ``shape.tokens`` tokens, of which ``sampled`` yield one. Padding yields for slot ``nobody``."""

    def __init__(self, shape: LayoutShape, sampled: int, nobody: int) -> None:
        self.shape, self.sampled, self._nobody = shape, sampled, nobody
        self._tokens = shape.size
        self._picks = self._tokens + aligned(shape.tokens)
        self._slots = self._picks + aligned(sampled)
        self.words = self._slots + aligned(sampled)

    def holds(self, other: StepInbox) -> bool:
        """Whether a step of ``other`` fits."""
        mine, its = self.shape, other.shape
        return mine.tokens >= its.tokens and mine.parts >= its.parts and mine.tiles >= its.tiles and self.sampled >= other.sampled

    def inputs(self, memory: Tensor, paging: Paging) -> Inputs:
        """Views of the beginning of ``memory``."""
        layout = view_layout(self.shape, memory[: self._tokens], paging)
        tokens = memory[self._tokens : self._tokens + self.shape.tokens]
        picks, slots = (memory[begin : begin + self.sampled] for begin in (self._picks, self._slots))
        return Inputs(layout, tokens, picks, slots)

    def fill(self, packed: Ints, slots: Ints, starts: Ints, lengths: Ints, tokens: Ints, rows: np.ndarray, heads: Heads) -> None:
        """Write a step into ``packed`` [words]; ``rows``: those that yield a token."""
        fill(self.shape, packed[: self._tokens], slots, starts, lengths, heads)
        ends = np.cumsum(lengths)[rows] - 1
        for begin, size, column, padding in (
            (self._tokens, self.shape.tokens, tokens, 0),
            (self._picks, self.sampled, ends, 0),
            (self._slots, self.sampled, slots[rows], self._nobody),
        ):
            _put(packed[begin : begin + size], column, padding)


class DecodeInbox:
    """The inbox of up to ``rows`` rows that all decode, of ``words`` words. Padding is the row of slot ``nobody``."""

    def __init__(self, rows: int, heads: Heads, nobody: int) -> None:
        self._rows, self._heads, self._nobody = rows, heads, nobody
        self._shape = decode_shape(rows, heads)
        self._tokens = self._shape.size
        self._slots = self._tokens + aligned(rows)
        self.words = self._slots + aligned(rows)

    def inputs(self, memory: Tensor, paging: Paging) -> Inputs:
        """Views of the beginning of ``memory``."""
        tokens, slots = (memory[begin : begin + self._rows] for begin in (self._tokens, self._slots))
        return Inputs(view_layout(self._shape, memory[: self._tokens], paging), tokens, None, slots)

    def fill(self, packed: Ints, slots: Ints, starts: Ints, tokens: Ints) -> None:
        """Write a step into ``packed`` [words]."""
        fill_decodes(self._shape, packed[: self._tokens], slots, starts, self._heads)
        _put(packed[self._tokens : self._tokens + self._rows], tokens, 0)
        _put(packed[self._slots : self._slots + self._rows], slots, self._nobody)


def _put(packed: Ints, column: np.ndarray, padding: int) -> None:
    packed[: len(column)], packed[len(column) :] = column, padding
