"""What a captured decode program reads: device memory that the host fills in one copy, or not at all.

Owns the order of its words, and the rule of what a program leaves there: positions one further, every token a guess, nothing to append. So
what a step has read is what its repetition reads; only blocks that it appends are sent. Must never know of plans.
"""

from __future__ import annotations

from torch import Tensor

from workers.core.plan import Ints
from workers.model.kernels.layout import Heads, Paging, aligned, decode_shape, fill_decodes
from workers.model.kernels.layout import view as view_layout


class Inbox:
    """The inbox of up to ``rows`` rows, at the beginning of ``memory``, which others share. Padding is the row of slot ``nobody``.

    ``layout``; ``tokens``, ``slots`` [rows]; ``cells`` [rows] of the block tables, counted through all of them, -1 = none, and the
    ``blocks`` [rows] that they get. ``appended``: the last two, for a copy of their own. ``words``: how much of ``memory`` it takes.
    """

    def __init__(self, rows: int, heads: Heads, memory: Tensor, paging: Paging, nobody: int) -> None:
        self._rows, self._heads, self._nobody = rows, heads, nobody
        self._shape = decode_shape(rows, heads)
        self._column = aligned(rows)
        begins = [self._shape.size + i * self._column for i in range(5)]
        self._tokens, self._slots, self._cells, _, self.words = begins
        self.layout = view_layout(self._shape, memory[: self._shape.size], paging)
        self.tokens, self.slots, self.cells, self.blocks = (memory[begin : begin + rows] for begin in begins[:4])
        self.appended = memory[self._cells : self.words]

    @staticmethod
    def longest(rows: int, heads: Heads) -> int:
        """``words`` for ``rows`` rows."""
        return decode_shape(rows, heads).size + 4 * aligned(rows)

    def fill(self, packed: Ints, slots: Ints, starts: Ints, tokens: Ints, cells: Ints, blocks: Ints) -> None:
        """Write a step into ``packed`` [words]."""
        count = len(slots)
        fill_decodes(self._shape, packed[: self._shape.size], slots, starts, self._heads)
        for begin, column, padding in ((self._tokens, tokens, 0), (self._slots, slots, self._nobody)):
            packed[begin : begin + count] = column
            packed[begin + count : begin + self._rows] = padding
        self.append(packed[self._cells : self.words], cells, blocks)

    def append(self, packed: Ints, cells: Ints, blocks: Ints) -> None:
        """Write ``appended`` into ``packed``, for at most ``rows`` blocks."""
        count, column = len(cells), self._column
        packed[:count], packed[count:column] = cells, -1
        packed[column : column + count] = blocks
