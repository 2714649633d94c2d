"""What GPU kernels learn of a step: int32 words in one packed buffer, planned on the host with numpy.

Owns the words' order and how attention is cut into programs: rows with one query token into *parts* of their context, longer ones into
*tiles* of query tokens. Shapes depend on nothing but counts, so a CUDA graph is replayed after its buffer is overwritten. Must never import
Triton: hosts plan with it, and tests check it where there is no GPU.

Parts (split-KV): a step aims at ``SPLIT_PROGRAMS`` programs over all rows and key/value heads, whatever its batch and contexts. Each row is
cut into equal parts no longer than a segment, which is the longest for which the programs suffice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.kernels.reference import Ints, token_positions

#: Head dimensions that the kernels are made for.
HEAD_DIMS = (16, 32, 64, 128, 256)
#: Query rows of one tile: tokens times the query heads that share a key/value head.
TILE_ROWS = 128
#: Programs over which decodes are spread when their rows alone are too few: four on each of an H100's 132 multiprocessors. Measured: twice
#: as many cost 6 to 20 % where rows are few, since there is more to merge.
SPLIT_PROGRAMS = 528
#: Contexts are cut at multiples of this many tokens: what a program reads in one turn of its loop.
SEGMENT_STEP = 64
#: Columns begin at multiples of this many words: 16 bytes, for which Triton compiles one kernel and not two.
_WORDS = 4
#: Words of one part and of one tile: a program finds all that it needs in one line of memory.
PART_WORDS, TILE_WORDS = 8, 4
#: Bound of a row's last part: it ends where the row does, however far that goes on.
OPEN = 2**30


class Heads(msgspec.Struct, frozen=True):
    """Attention heads of one rank."""

    query: int
    kv: int

    @property
    def tile_tokens(self) -> int:
        """Query tokens of one tile."""
        return max(1, TILE_ROWS * self.kv // self.query)

    @property
    def spare_parts(self) -> int:
        """Parts that a step may have beyond one a row."""
        return -(-SPLIT_PROGRAMS // self.kv)


class LayoutShape(msgspec.Struct, frozen=True, kw_only=True):
    """Capacity of a packed layout: query ``tokens``, ``parts`` of decode rows, ``tiles`` of longer ones."""

    tokens: int
    parts: int
    tiles: int

    @property
    def spans(self) -> tuple[slice, slice, slice, slice]:
        """Where positions, slots, parts and tiles lie."""
        positions, slots = aligned(self.tokens), 2 * aligned(self.tokens)
        parts = slots + PART_WORDS * self.parts
        return slice(0, self.tokens), slice(positions, positions + self.tokens), slice(slots, parts), slice(parts, self.size)

    @property
    def size(self) -> int:
        """Words of the packed buffer."""
        return 2 * aligned(self.tokens) + PART_WORDS * self.parts + TILE_WORDS * self.tiles


def aligned(words: int) -> int:
    """Where the next column begins."""
    return -(-words // _WORDS) * _WORDS


def decode_shape(rows: int, heads: Heads) -> LayoutShape:
    """Shape of a step of at most ``rows`` rows with one query token each, at any context."""
    return LayoutShape(tokens=rows, parts=rows + heads.spare_parts, tiles=0)


def mixed_shape(tokens: int, heads: Heads) -> LayoutShape:
    """Shape of nearly any step of at most ``tokens`` query tokens: not of one whose longer rows have tiles of a single token mostly."""
    return LayoutShape(tokens=tokens, parts=tokens + heads.spare_parts, tiles=tokens // 2 + tokens // heads.tile_tokens + 1)


def step_shape(lengths: Ints, heads: Heads) -> LayoutShape:
    """Shape of one step whose rows have ``lengths`` [R] query tokens."""
    decodes = _decodes(lengths)
    tiles = int((-(-lengths[decodes:] // heads.tile_tokens)).sum())
    return LayoutShape(tokens=int(lengths.sum()), parts=decodes + heads.spare_parts if decodes else 0, tiles=tiles)


def _decodes(lengths: Ints) -> int:
    """Leading rows with one query token."""
    longer = lengths != 1
    return int(longer.argmax()) if longer.any() else len(lengths)


def fill(shape: LayoutShape, out: Ints, slots: Ints, starts: Ints, lengths: Ints, heads: Heads, segment: int | None = None) -> None:
    """Plan a step into ``out`` [shape.size] int32: rows in order of their tokens, as in a StepPlan, whose tables are at ``slots`` [R].

    Tokens of ``shape`` beyond the rows' are padding: position -1, nothing stored; in a shape without tiles their attention is zero.
    ``segment``: the longest part, tokens, instead of the batch's own choice, so that a row's cuts depend on its context alone; a multiple
    of ``SEGMENT_STEP``.

    Raises:
        ValueError: the step does not fit ``shape``.
    """
    total, decodes = int(lengths.sum()), _decodes(lengths)
    if total > shape.tokens:
        raise ValueError(f"a step of {total} tokens does not fit a layout of {shape.tokens}")
    if total == decodes == len(lengths) and not shape.tiles:
        fill_decodes(shape, out, slots, starts, heads, segment)
        return
    positions, tables, parts, tiles = (out[span] for span in shape.spans)
    rows, positions[:total] = token_positions(starts, lengths)
    tables[:total] = slots[rows]
    positions[total:], tables[total:] = -1, 0
    padded = decodes if shape.tiles else shape.tokens
    _put_parts(parts.reshape(-1, PART_WORDS), tables[:padded], positions[:padded] + 1, segment, heads.spare_parts)
    if shape.tiles or decodes < len(lengths):
        _put_tiles(tiles.reshape(-1, TILE_WORDS), slots[decodes:], starts[decodes:], lengths[decodes:], decodes, heads.tile_tokens)


def fill_decodes(shape: LayoutShape, out: Ints, slots: Ints, starts: Ints, heads: Heads, segment: int | None = None) -> None:
    """:func:`fill` for rows with one query token each and a shape without tiles: the host pays for it in every decode step."""
    positions, tables, parts, _ = (out[span] for span in shape.spans)
    count = len(slots)
    positions[:count], tables[:count] = starts, slots
    positions[count:], tables[count:] = -1, 0
    # Padding is a row with no context, so that its output is written too.
    _put_parts(parts.reshape(-1, PART_WORDS), tables, positions + 1, segment, heads.spare_parts)


@cache
def _whole(rows: int) -> Ints:
    """Lines of ``rows`` parts that each are all of their row, whose slots are still to be written."""
    lines = np.zeros((rows, PART_WORDS), np.int32)
    lines[:, 0] = lines[:, 4] = np.arange(rows)
    lines[:, 3], lines[:, 5] = OPEN, 1
    return lines


def _put_parts(out: Ints, slots: Ints, contexts: Ints, segment: int | None, spare: int) -> None:
    """Cut ``contexts`` [rows] into equal parts of at most ``segment`` tokens each."""
    count = len(contexts)
    if segment is None:
        fair = -(-int(contexts.sum()) // spare)
        segment = max(1, -(-fair // SEGMENT_STEP)) * SEGMENT_STEP
    if count and contexts.max() <= segment:
        out[:count] = _whole(1 << (count - 1).bit_length())[:count]
        out[:count, 1] = slots
        out[count:] = -1
        return
    counts = np.maximum(-(-contexts // segment), 1)
    lengths = -(-contexts // (counts * SEGMENT_STEP)) * SEGMENT_STEP
    rows, numbers, firsts = _pieces(counts)
    begins = numbers * lengths[rows]
    bounds = np.where(numbers == counts[rows] - 1, OPEN, begins + lengths[rows])
    _put(out, rows, slots[rows], begins, bounds, firsts[rows], counts[rows])


def _put_tiles(out: Ints, slots: Ints, starts: Ints, lengths: Ints, first: int, tokens: int) -> None:
    """Cut rows whose query tokens begin at ``first`` of the step. Long contexts come first: the short ones then fill the last wave."""
    rows, numbers, _ = _pieces(-(-lengths // tokens))
    begins = numbers * tokens
    counts = np.minimum(lengths[rows] - begins, tokens)
    order = np.argsort(-(starts[rows] + begins + counts), kind="stable")
    firsts = first + np.cumsum(lengths) - lengths
    rows, begins = rows[order], begins[order]
    _put(out, firsts[rows] + begins, counts[order], slots[rows], starts[rows] + begins)


def _pieces(counts: Ints) -> tuple[Ints, Ints, Ints]:
    """(row of each piece, its number in the row, the first piece of each row) of rows cut into ``counts`` pieces."""
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    return rows, np.arange(len(rows), dtype=np.int32) - firsts[rows], firsts


def _put(lines: Ints, *columns: npt.NDArray[np.integer]) -> None:
    count = len(columns[0])
    if count > len(lines):
        raise ValueError(f"{count} parts or tiles do not fit a layout of {len(lines)}")
    for index, column in enumerate(columns):
        lines[:count, index] = column
    lines[count:] = -1


@dataclass(frozen=True, slots=True)
class Paging:
    """Device memory that outlives steps: block ``tables`` [slots, width] int32, and ``arrived`` [slots * kv_heads] int32, zero between
    launches, by which the last part of a row knows that it merges. Kernels that share it must run one after the other."""

    tables: Tensor
    arrived: Tensor

    @staticmethod
    def over(tables: Tensor, heads: Heads) -> Paging:
        """For ``tables``, whose entries may say nothing until written."""
        return Paging(tables, torch.zeros(len(tables) * heads.kv, dtype=torch.int32, device=tables.device))


class SlotOffsets(NamedTuple):
    """Where a :class:`SlotState`'s parts begin in its ``words``, and how many there are. ``tables`` begin at 0."""

    tokens: int
    seeds: int
    temperatures: int
    words: int

    @staticmethod
    def of(slots: int, width: int) -> SlotOffsets:
        tokens = aligned(slots * width)
        seeds = tokens + aligned(slots + 1)
        temperatures = seeds + aligned(2 * (slots + 1))
        return SlotOffsets(tokens, seeds, temperatures, temperatures + aligned(slots + 1))


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a device remembers of the row in each slot, all of it in ``words`` int32, so that news are places and values.

    Block ``tables`` [slots, width] int32; and, for one slot more, which padding reads and writes: the last ``tokens`` [slots + 1] int32,
    the words of their ``seeds`` [slots + 1, 2] int32 (:func:`workers.sampling.definition.seed_keys`), ``temperatures`` [slots + 1] fp32.
    """

    words: Tensor
    tables: Tensor
    tokens: Tensor
    seeds: Tensor
    temperatures: Tensor

    @staticmethod
    def empty(slots: int, width: int, device: torch.device) -> SlotState:
        """Nobody's rows, greedy. ``width``: blocks of the longest row."""
        at = SlotOffsets.of(slots, width)
        words = torch.zeros(at.words, dtype=torch.int32, device=device)
        return SlotState(
            words,
            words[: slots * width].view(slots, width),
            words[at.tokens : at.tokens + slots + 1],
            words[at.seeds : at.seeds + 2 * (slots + 1)].view(-1, 2),
            words[at.temperatures : at.temperatures + slots + 1].view(torch.float32),
        )


#: Words before a submission's inbox: how many words that has, how many news follow it, how many returned tokens, the step's number.
HEAD_WORDS = 8
#: Turns and steps are told apart by this many low bits of their numbers.
NUMBER_MASK = 2**30 - 1


@dataclass(frozen=True, slots=True)
class Rings:
    """Memory of the host through which it and its device tell each other of steps (:mod:`workers.runner.host_device_rings`).

    ``submissions`` [depth, words] int32: a head, an inbox, places in :class:`SlotState`'s words and their values, places that get what
    another rank returned; each of these columns ends at a multiple of 4 words. ``completions`` [depth, rows] int64: a row's token, -1 =
    nothing finite, in the low half, the step's number in the high half. ``read`` [1] int32: the last turn whose submission the device has
    read. ``turn`` [2] int32, on the device: that turn, and its step's number. ``depth`` is a power of two.
    """

    submissions: Tensor
    completions: Tensor
    read: Tensor
    turn: Tensor

    @staticmethod
    def empty(pinned: Callable[[int], Tensor], place: torch.device, *, words: int, rows: int, depth: int) -> Rings:
        """``pinned`` gives that many zeros, int32, of the host which the device at ``place`` reads and writes too."""
        words = -(-words // 64) * 64
        return Rings(
            pinned(depth * words).view(depth, words),
            pinned(2 * depth * rows).view(torch.int64).view(depth, rows),
            pinned(1),
            torch.zeros(2, dtype=torch.int32, device=place),
        )


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Views of one packed buffer on the device, int32.

    ``positions``, ``slots`` [tokens]: where each token stands in its row, -1 for padding, and that row's table. ``parts`` [n, 8]: row,
    slot, first token of the context, the token before which it ends if the row does not, the row's first part and how many it has: so a
    layout whose positions are raised by one is the next step's. ``tiles`` [n, 4]: first query token of the step, how many, slot, position
    of the first. A first word of -1: no part, no tile.
    """

    positions: Tensor
    slots: Tensor
    parts: Tensor
    tiles: Tensor
    paging: Paging


def view(shape: LayoutShape, packed: Tensor, paging: Paging) -> DeviceLayout:
    """The layout that kernels read from ``packed`` [shape.size] int32; its contents may change between launches."""
    if packed.dtype != torch.int32 or packed.shape != (shape.size,):
        raise ValueError(f"a packed layout is {shape.size} words of int32, not {packed.dtype} {tuple(packed.shape)}")
    positions, slots, parts, tiles = (packed[span] for span in shape.spans)
    return DeviceLayout(positions, slots, parts.view(-1, PART_WORDS), tiles.view(-1, TILE_WORDS), paging)
