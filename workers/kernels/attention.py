"""Paged attention in Triton: parts of decode rows and tiles of longer ones, as :mod:`.layout` cuts them.

Owns how a program walks a block table. The query heads that share a key/value head are rows of one product, so keys and values are read
once for all of them. The softmax is kept in powers of two and fp32. Grids are sizes of the layout, never contexts. Must never allocate but
its output and the parts' partial results.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.step_layout import HEAD_DIMS, PART_WORDS, TILE_ROWS, TILE_WORDS, DeviceLayout

#: exp(x) = exp2(LOG2E * x).
_LOG2E = 1.4426950408889634
#: fp32 values of partial results that a merging program holds at once.
_MERGE_VALUES = 8192


class AttentionTuning(NamedTuple):
    """How a kernel is compiled: ``keys`` a turn of its loop, ``warps`` a program, ``stages`` of loads in flight, ``registers`` a thread at
    most (None = as many as it likes)."""

    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"KEYS": self.keys, "STAGES": self.stages, "num_warps": self.warps, **limit}


def decode_tuning(cache: Tensor) -> AttentionTuning:
    """Loads bound decodes: small programs, four or five a multiprocessor, keep the most bytes in flight (the best of 19 measured)."""
    if cache.element_size() * cache.shape[3] > 256:
        return AttentionTuning(32, 4, 2)
    return AttentionTuning(64, 2, 5 if cache.element_size() == 1 else 3)


def tile_tuning(cache: Tensor) -> AttentionTuning:
    """Products bound tiles: with 128 registers a thread two programs share a multiprocessor, and one multiplies while the other takes
    exponentials (measured: a quarter faster than one program with what registers it likes)."""
    if cache.element_size() * cache.shape[3] > 256:
        return AttentionTuning(32, 8, 2)
    return AttentionTuning(64, 8, 3, 128)


@triton.jit
def _fold(
    query, cache, table, head, begin, end, last, peak, norm, mixed, scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, KV: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold keys ``begin``..``end`` into the running softmax of ``query`` [M, DIM]: its ``peak`` and ``norm`` [M] and ``mixed`` [M, DIM].

    ``last`` [M]: the last key that each row sees. Only with MASKED may ``end`` stand anywhere, and may a row not see all keys.
    """
    dims = tl.arange(0, DIM)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        places = start + tl.arange(0, KEYS)
        inside = places < end
        if BLOCK % KEYS == 0:
            blocks = tl.load(table + start // BLOCK)
        elif MASKED:
            blocks = tl.load(table + places // BLOCK, mask=inside, other=0)
        else:
            blocks = tl.load(table + places // BLOCK)
        lines = ((blocks.to(tl.int64) * BLOCK + places % BLOCK) * (2 * KV) + head) * DIM
        # What lies beyond a row's context may be anything, and 0 * NaN is NaN: it is not loaded.
        if MASKED:
            keys = tl.load(cache + lines[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
            values = tl.load(cache + KV * DIM + lines[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        else:
            keys = tl.load(cache + lines[:, None] + dims[None, :])
            values = tl.load(cache + KV * DIM + lines[:, None] + dims[None, :])
        scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee")
        if MASKED:
            scores = tl.where(places[None, :] <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        decay = tl.exp2(peak - higher)
        norm = norm * decay + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(query.dtype), values.to(query.dtype), mixed * decay[:, None], input_precision="ieee")
        peak = higher
    return peak, norm, mixed


@triton.jit
def _merge(
    out, mixes, peaks, norms, first, parts, head, row,
    KV: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the attention of ``row`` from its ``parts`` partial results, in their order; PAIRED: GROUP rounded up to a power of two."""
    dims, members = tl.arange(0, DIM), tl.arange(0, PAIRED)
    peak = tl.full([PAIRED], float("-inf"), tl.float32)
    norm = tl.zeros([PAIRED], tl.float32)
    mixed = tl.zeros([PAIRED, DIM], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        numbers = begin + tl.arange(0, AT_ONCE)
        lines = ((first + numbers) * KV + head)[:, None] * GROUP + members[None, :]
        there = (numbers < parts)[:, None] & (members < GROUP)[None, :]
        # Other programs wrote these: .cg, so that no stale line of the first cache is read.
        found = tl.load(peaks + lines, mask=there, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(found, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(found - finite[None, :])
        decay = tl.exp2(peak - finite)
        norm = norm * decay + tl.sum(weights * tl.load(norms + lines, mask=there, other=0.0, cache_modifier=".cg"), 0)
        parts_mixed = tl.load(
            mixes + lines[:, :, None] * DIM + dims[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        mixed = mixed * decay[:, None] + tl.sum(weights[:, :, None] * parts_mixed, 0)
        peak = higher
    place = ((row * KV + head) * GROUP + members)[:, None] * DIM + dims[None, :]
    tl.store(out + place, mixed / tl.where(norm > 0.0, norm, 1.0)[:, None], mask=(members < GROUP)[:, None])


@triton.jit(do_not_specialize=["width"])
def _decode(
    out, mixes, peaks, norms, query, cache, lines_of_parts, positions, tables, arrived, scale, token_stride, width,
    KV: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one row for one key/value head; the last part to arrive merges them all. ROWS: GROUP padded to what a product takes."""
    head, part = tl.program_id(0), tl.program_id(1)
    line = lines_of_parts + part * WORDS
    row, slot, begin, bound = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    first, parts = tl.load(line + 4), tl.load(line + 5)
    end = tl.minimum(bound, tl.load(positions + tl.maximum(row, 0)) + 1)
    enter(EARLY)
    if row < 0:
        return
    table = tables + slot * width
    dims, members = tl.arange(0, DIM), tl.arange(0, ROWS)
    mine = (members < GROUP)[:, None]
    lines = ((head * GROUP + members) * DIM)[:, None] + dims[None, :]
    asked = tl.load(query + row.to(tl.int64) * token_stride + lines, mask=mine, other=0.0).to(KIND)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.zeros([ROWS], tl.int32) + (end - 1)
    peak, norm, mixed = _fold(
        asked, cache, table, head, begin, end, last, peak, norm, mixed, scale, BLOCK, KEYS, DIM, KV, True, STAGES
    )  # fmt: skip
    if parts == 1:
        tl.store(out + row * (KV * GROUP * DIM) + lines, mixed / tl.where(norm > 0.0, norm, 1.0)[:, None], mask=mine)
    else:
        place = (part * KV + head) * GROUP + members
        tl.store(peaks + place, peak, mask=members < GROUP)
        tl.store(norms + place, norm, mask=members < GROUP)
        tl.store(mixes + place[:, None] * DIM + dims[None, :], mixed, mask=mine)
        # All threads' stores come before the count, and the count of the others before their results are read.
        tl.debug_barrier()
        count = arrived + row * KV + head
        if tl.atomic_add(count, 1, sem="acq_rel") == parts - 1:
            _merge(out, mixes, peaks, norms, first, parts, head, row, KV, GROUP, PAIRED, DIM, AT_ONCE)
            tl.store(count, 0)


@triton.jit(do_not_specialize=["width"])
def _tile(
    out, query, cache, lines_of_tiles, tables, scale, token_stride, width,
    KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Query tokens of one tile for one key/value head: rows of the product are (token, query head of the group)."""
    head, line = tl.program_id(0), lines_of_tiles + tl.program_id(1) * WORDS
    first, count, slot, start = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    enter(EARLY)
    if first < 0:
        return
    table = tables + slot * width
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    tokens = rows // GROUP
    mine = (tokens < count)[:, None]
    members = (head * GROUP + rows % GROUP) * DIM
    asked = (first + tokens).to(tl.int64)
    lines = (asked * token_stride + members)[:, None] + dims[None, :]
    turned = tl.load(query + lines, mask=mine, other=0.0).to(KIND)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    last = start + tokens
    # Keys that every row sees, whole turns of them, need no mask.
    seen = (start + 1) // KEYS * KEYS
    peak, norm, mixed = _fold(
        turned, cache, table, head, 0, seen, last, peak, norm, mixed, scale, BLOCK, KEYS, DIM, KV, False, STAGES
    )  # fmt: skip
    peak, norm, mixed = _fold(
        turned, cache, table, head, seen, start + count, last, peak, norm, mixed, scale, BLOCK, KEYS, DIM, KV, True, STAGES
    )  # fmt: skip
    tl.store(out + (asked * (KV * GROUP * DIM) + members)[:, None] + dims[None, :], mixed / norm[:, None], mask=mine)


def _product_kind(query: Tensor, cache: Tensor) -> tl.dtype:
    """What is multiplied: the model's dtype, or fp16 with an FP8 cache, since one instruction widens FP8 to fp16, and many to bf16."""
    if cache.dtype == torch.float8_e4m3fn:
        return tl.float16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]


def paged_attention(
    query: Tensor, cache: Tensor, layout: DeviceLayout, *, decode: AttentionTuning | None = None, tile: AttentionTuning | None = None
) -> Tensor:
    """Causal softmax attention of ``query`` [T, heads, dim] (heads contiguous) over ``cache``; [T, heads * dim].

    ``decode``, ``tile``: other tunings than this device's own.
    """
    tokens, heads, dim = query.shape
    block, kv = cache.shape[1], cache.shape[2] // 2
    if dim not in HEAD_DIMS:
        raise ValueError(f"head dimension {dim} is not one of {HEAD_DIMS}")
    out = torch.empty(tokens, heads * dim, dtype=query.dtype, device=query.device)
    tables = layout.paging.tables
    parts, tiles = len(layout.parts), len(layout.tiles)
    shared = {"KV": kv, "GROUP": heads // kv, "DIM": dim, "BLOCK": block, "KIND": _product_kind(query, cache), **early()}
    scale = dim**-0.5 * _LOG2E
    if parts:
        tuning = decode or decode_tuning(cache)
        paired = triton.next_power_of_2(heads // kv)
        mixes = torch.empty(parts, heads, dim, dtype=torch.float32, device=query.device)
        peaks, norms = (torch.empty(parts, heads, dtype=torch.float32, device=query.device) for _ in range(2))
        _decode[(kv, parts)](
            out, mixes, peaks, norms, query, cache, layout.parts, layout.positions, tables, layout.paging.arrived, scale,
            query.stride(0), tables.stride(0), **shared, PAIRED=paired, ROWS=max(16, paired), WORDS=PART_WORDS,
            AT_ONCE=max(1, _MERGE_VALUES // (paired * dim)), **tuning.options(),
        )  # fmt: skip
    if tiles:
        tuning = tile or tile_tuning(cache)
        _tile[(kv, tiles)](
            out, query, cache, layout.tiles, tables, scale, query.stride(0), tables.stride(0),
            **shared, ROWS=TILE_ROWS, WORDS=TILE_WORDS, **tuning.options(),
        )  # fmt: skip
    return out
