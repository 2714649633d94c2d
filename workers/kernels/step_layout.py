"""The layout of a step that GPU kernels read: int32 words in one packed buffer, written on the host with numpy.

Owns the order of the words, the memory that host and device share, and how attention is split into programs: a sequence with one query
token into *parts* of its context, a longer one into *tiles* of query tokens. Shapes depend on counts only, so a CUDA graph can be replayed
after its buffer was overwritten. Must never import Triton: hosts plan with this module, and tests check it where there is no GPU.

Parts (split-KV): a step aims at ``SPLIT_PROGRAMS`` programs over all sequences and key/value heads, whatever its batch and contexts. Each
sequence is cut into equal parts no longer than a segment; the segment is as short as the number of programs allows.
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

#: Rows of the product of one tile: query tokens times the query heads that share a key/value head.
TILE_ROWS = 128
#: Programs over which decodes are spread when there are too few sequences to fill the GPU: four on each of an H100's 132 multiprocessors.
#: Measured: twice as many programs cost 6 to 20 % with few sequences, since there is more to merge.
SPLIT_PROGRAMS = 528
#: Contexts are cut at multiples of this many tokens: what a program reads in one iteration of its loop.
SEGMENT_STEP = 64
#: Columns begin at multiples of this many words: 16 bytes, for which Triton compiles one kernel and not two.
_WORDS = 4
#: Words of one part and of one tile: a program finds all that it needs in one line of memory.
PART_WORDS, TILE_WORDS = 8, 4
#: End of the last part of a sequence: the part ends where the context does, which grows while the step is repeated.
UNBOUNDED = 2**30


class Heads(msgspec.Struct, frozen=True):
    """Attention heads of one rank."""

    query: int
    kv: int

    @property
    def tile_tokens(self) -> int:
        """Most query tokens of one tile."""
        return max(1, TILE_ROWS * self.kv // self.query)

    @property
    def spare_parts(self) -> int:
        """Parts that a step may have beyond one for each sequence."""
        return -(-SPLIT_PROGRAMS // self.kv)


class LayoutShape(msgspec.Struct, frozen=True, kw_only=True):
    """Capacity of a packed layout: query ``tokens``, ``parts`` of sequences that decode, ``tiles`` of the others."""

    tokens: int
    parts: int
    tiles: int

    @property
    def spans(self) -> tuple[slice, slice, slice, slice]:
        """The words of positions, slots, parts and tiles."""
        positions, slots = aligned(self.tokens), 2 * aligned(self.tokens)
        parts = slots + PART_WORDS * self.parts
        return slice(0, self.tokens), slice(positions, positions + self.tokens), slice(slots, parts), slice(parts, self.size)

    @property
    def size(self) -> int:
        """Words of the packed buffer."""
        return 2 * aligned(self.tokens) + PART_WORDS * self.parts + TILE_WORDS * self.tiles


def aligned(words: int) -> int:
    """``words``, rounded up to where the next column begins."""
    return -(-words // _WORDS) * _WORDS


def decode_shape(sequences: int, heads: Heads) -> LayoutShape:
    """Shape that holds any step of at most ``sequences`` sequences with one query token each, at any context."""
    return LayoutShape(tokens=sequences, parts=sequences + heads.spare_parts, tiles=0)


def mixed_shape(tokens: int, heads: Heads) -> LayoutShape:
    """Shape for nearly any step of at most ``tokens`` query tokens. It is too small if the step has many short sequences of two or more
    query tokens, whose tiles are mostly a single token each."""
    return LayoutShape(tokens=tokens, parts=tokens + heads.spare_parts, tiles=tokens // 2 + tokens // heads.tile_tokens + 1)


def step_shape(lengths: Ints, heads: Heads) -> LayoutShape:
    """Exact shape of a step whose sequences have ``lengths`` [R] query tokens."""
    decodes = _decodes(lengths)
    tiles = int((-(-lengths[decodes:] // heads.tile_tokens)).sum())
    return LayoutShape(tokens=int(lengths.sum()), parts=decodes + heads.spare_parts if decodes else 0, tiles=tiles)


def _decodes(lengths: Ints) -> int:
    """How many sequences at the front have one query token each."""
    longer = lengths != 1
    return int(longer.argmax()) if longer.any() else len(lengths)


def fill_layout(shape: LayoutShape, out: Ints, slots: Ints, starts: Ints, lengths: Ints, heads: Heads, segment: int | None = None) -> None:
    """Write the layout of a step into ``out`` [shape.size] int32; ``slots``, ``starts``, ``lengths`` [R] as in a StepPlan.

    Tokens of ``shape`` beyond those of the step are padding: position -1, nothing is stored, and in a shape without tiles their attention
    is zero. ``segment``: tokens of the longest part, a multiple of ``SEGMENT_STEP``; by default the whole batch determines it, with a given
    one the cuts of a sequence depend on its context alone.

    Raises:
        ValueError: the step does not fit ``shape``.
    """
    total, decodes = int(lengths.sum()), _decodes(lengths)
    if total > shape.tokens:
        raise ValueError(f"a step of {total} tokens does not fit a layout of {shape.tokens}")
    if total == decodes == len(lengths) and not shape.tiles:
        fill_decode_layout(shape, out, slots, starts, heads, segment)
        return
    positions, tables, parts, tiles = (out[span] for span in shape.spans)
    sequences, positions[:total] = token_positions(starts, lengths)
    tables[:total] = slots[sequences]
    positions[total:], tables[total:] = -1, 0
    padded = decodes if shape.tiles else shape.tokens
    _put_parts(parts.reshape(-1, PART_WORDS), tables[:padded], positions[:padded] + 1, segment, heads.spare_parts)
    if shape.tiles or decodes < len(lengths):
        _put_tiles(tiles.reshape(-1, TILE_WORDS), slots[decodes:], starts[decodes:], lengths[decodes:], decodes, heads.tile_tokens)


def fill_decode_layout(shape: LayoutShape, out: Ints, slots: Ints, starts: Ints, heads: Heads, segment: int | None = None) -> None:
    """:func:`fill_layout` for sequences with one query token each and a shape without tiles. The host runs this in every decode step that
    is not repeated, so it is kept short."""
    positions, tables, parts, _ = (out[span] for span in shape.spans)
    count = len(slots)
    positions[:count], tables[:count] = starts, slots
    positions[count:], tables[count:] = -1, 0
    # Padding is a sequence with no context, so that its output is written too.
    _put_parts(parts.reshape(-1, PART_WORDS), tables, positions + 1, segment, heads.spare_parts)


@cache
def _uncut_parts(sequences: int) -> Ints:
    """[sequences, PART_WORDS] int32: one part for each whole sequence, but for the slots."""
    lines = np.zeros((sequences, PART_WORDS), np.int32)
    lines[:, 0] = lines[:, 4] = np.arange(sequences)
    lines[:, 3], lines[:, 5] = UNBOUNDED, 1
    return lines


def _put_parts(out: Ints, slots: Ints, contexts: Ints, segment: int | None, spare: int) -> None:
    """Write the parts of sequences of ``contexts`` [R] tokens: equal ones of at most ``segment`` tokens each. ``spare``: parts that there
    may be beyond one a sequence; they bound the segment where it is None."""
    count = len(contexts)
    if segment is None:
        fair = -(-int(contexts.sum()) // spare)
        segment = max(1, -(-fair // SEGMENT_STEP)) * SEGMENT_STEP
    if count and contexts.max() <= segment:
        out[:count] = _uncut_parts(1 << (count - 1).bit_length())[:count]
        out[:count, 1] = slots
        out[count:] = -1
        return
    counts = np.maximum(-(-contexts // segment), 1)
    lengths = -(-contexts // (counts * SEGMENT_STEP)) * SEGMENT_STEP
    sequences, numbers, firsts = _pieces(counts)
    begins = numbers * lengths[sequences]
    ends = np.where(numbers == counts[sequences] - 1, UNBOUNDED, begins + lengths[sequences])
    _put(out, sequences, slots[sequences], begins, ends, firsts[sequences], counts[sequences])


def _put_tiles(out: Ints, slots: Ints, starts: Ints, lengths: Ints, first: int, tokens: int) -> None:
    """Write the tiles, of at most ``tokens`` query tokens each, of sequences whose query tokens begin at token ``first`` of the step. Tiles
    with long contexts come first: the short ones then fill the last wave of programs."""
    sequences, numbers, _ = _pieces(-(-lengths // tokens))
    begins = numbers * tokens
    counts = np.minimum(lengths[sequences] - begins, tokens)
    order = np.argsort(-(starts[sequences] + begins + counts), kind="stable")
    firsts = first + np.cumsum(lengths) - lengths
    sequences, begins = sequences[order], begins[order]
    _put(out, firsts[sequences] + begins, counts[order], slots[sequences], starts[sequences] + begins)


def _pieces(counts: Ints) -> tuple[Ints, Ints, Ints]:
    """(sequence of each piece, its number in the sequence, the first piece of each sequence) of sequences cut into ``counts`` [R]
    pieces."""
    sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    return sequences, np.arange(len(sequences), dtype=np.int32) - firsts[sequences], firsts


def _put(lines: Ints, *columns: npt.NDArray[np.integer]) -> None:
    """Write ``columns`` into the first lines and -1 into the rest. Raises ValueError when there are too few lines."""
    count = len(columns[0])
    if count > len(lines):
        raise ValueError(f"{count} parts or tiles do not fit a layout of {len(lines)}")
    for index, column in enumerate(columns):
        lines[:count, index] = column
    lines[count:] = -1


@dataclass(frozen=True, slots=True)
class Paging:
    """Device memory that is kept between steps. ``tables`` [slots, width] int32: block tables. ``arrived`` [slots * kv_heads] int32, zero
    between launches: how many parts of a sequence are done, so that the last one knows that it merges them. Kernels that share it must run
    one after the other."""

    tables: Tensor
    arrived: Tensor

    @staticmethod
    def over(tables: Tensor, heads: Heads) -> Paging:
        """A Paging over ``tables``, whose entries need not be valid yet."""
        return Paging(tables, torch.zeros(len(tables) * heads.kv, dtype=torch.int32, device=tables.device))


class SlotOffsets(NamedTuple):
    """Where the arrays of a :class:`SlotState` begin in its ``words``, and the number of these. ``tables`` begin at 0."""

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
    """The device's state of the sequence in each slot. All arrays lie in ``words`` int32, so an update is a word index and a value.

    ``tables`` [slots, width] int32: block tables. For one slot more, which padding reads and writes: ``tokens`` [slots + 1] int32, the last
    tokens; ``seeds`` [slots + 1, 2] int32 (:func:`workers.sampling.definition.seed_keys`); ``temperatures`` [slots + 1] fp32, 0 = greedy.
    """

    words: Tensor
    tables: Tensor
    tokens: Tensor
    seeds: Tensor
    temperatures: Tensor

    @staticmethod
    def empty(slots: int, width: int, device: torch.device) -> SlotState:
        """All slots empty and greedy. ``width``: blocks of the longest sequence."""
        at = SlotOffsets.of(slots, width)
        words = torch.zeros(at.words, dtype=torch.int32, device=device)
        return SlotState(
            words,
            words[: slots * width].view(slots, width),
            words[at.tokens : at.tokens + slots + 1],
            words[at.seeds : at.seeds + 2 * (slots + 1)].view(-1, 2),
            words[at.temperatures : at.temperatures + slots + 1].view(torch.float32),
        )


#: Words of a submission's header: [0] words of step inputs, [1] slot updates, [2] returned tokens, [3] the step's number; the rest is
#: unused.
HEADER_WORDS = 8
#: Submissions and steps are numbered modulo 2**30: this mask keeps the low bits of a number.
NUMBER_MASK = 2**30 - 1


@dataclass(frozen=True, slots=True)
class Rings:
    """Host memory through which host and device exchange steps (:mod:`workers.runner.host_device_rings`).

    ``submissions`` [depth, words] int32: a header, a step's inputs, word indices of :class:`SlotState` and their values, and word indices
    that get the tokens which another rank returned; each of these columns is padded to a multiple of 4 words. ``completions``
    [depth, sequences] int64: in the low half a sequence's token (-1 = no logit is finite), in the high half the step's number. ``read`` [1]
    int32: number of the last submission that the device has read. ``taken`` [2] int32, on the device: that number, and its step's number.
    ``depth`` is a power of two.
    """

    submissions: Tensor
    completions: Tensor
    read: Tensor
    taken: Tensor

    @staticmethod
    def empty(pinned: Callable[[int], Tensor], device: torch.device, *, words: int, sequences: int, depth: int) -> Rings:
        """Empty rings for ``device``. ``pinned(n)`` returns [n] int32 zeros in host memory that the device reads and writes too."""
        words = -(-words // 64) * 64
        return Rings(
            pinned(depth * words).view(depth, words),
            pinned(2 * depth * sequences).view(torch.int64).view(depth, sequences),
            pinned(1),
            torch.zeros(2, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Views of one packed buffer on the device, int32.

    ``positions``, ``slots`` [tokens]: each token's position in its sequence (-1 = padding) and the slot of that sequence. ``parts`` [n, 8]:
    sequence; slot; first context token of the part; its end, if the context does not end before; the sequence's first part; how many parts
    it has; two unused. So a layout whose positions are raised by one is that of the next step. ``tiles`` [n, 4]: first query token in the
    step, how many query tokens, slot, position of the first. A first word of -1 marks an unused part or tile.
    """

    positions: Tensor
    slots: Tensor
    parts: Tensor
    tiles: Tensor
    paging: Paging


def view_layout(shape: LayoutShape, packed: Tensor, paging: Paging) -> DeviceLayout:
    """Views of ``packed`` [shape.size] int32 for the kernels; its contents may change between launches. Raises ValueError for another
    size."""
    if packed.dtype != torch.int32 or packed.shape != (shape.size,):
        raise ValueError(f"a packed layout is {shape.size} words of int32, not {packed.dtype} {tuple(packed.shape)}")
    positions, slots, parts, tiles = (packed[span] for span in shape.spans)
    return DeviceLayout(positions, slots, parts.view(-1, PART_WORDS), tiles.view(-1, TILE_WORDS), paging)
