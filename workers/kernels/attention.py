"""Paged attention in Triton, over parts of sequences that decode and tiles of the others, as :mod:`.step_layout` splits them.

Owns the way in which a program reads a block table. The query heads that share a key/value head are rows of one product, so keys and values
are read once for all of them. The softmax is computed in powers of two and fp32. Grids depend on the layout's sizes, never on contexts.
Must allocate only its output and the partial results of parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.step_layout import PART_WORDS, TILE_ROWS, TILE_WORDS, DeviceLayout
from workers.protocol.specs import GPU_HEAD_DIMS

#: exp(x) = exp2(LOG2E * x).
_LOG2E = 1.4426950408889634
#: fp32 values of partial results that a merging program holds at once.
_MERGE_VALUES = 8192


class AttentionTuning(NamedTuple):
    """How a kernel is compiled: ``keys`` in each iteration of its loop, ``warps`` of a program, ``stages`` of loads in flight, and the most
    ``registers`` of a thread (None = no limit)."""

    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Launch options and compile-time parameters."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"KEYS": self.keys, "STAGES": self.stages, "num_warps": self.warps, **limit}


def decode_tuning(cache: Tensor) -> AttentionTuning:
    """Decodes are limited by loads: small programs, four or five per multiprocessor, keep the most bytes in flight (the best of 19 measured
    tunings)."""
    if cache.element_size() * cache.shape[3] > 256:
        return AttentionTuning(32, 4, 2)
    return AttentionTuning(64, 2, 5 if cache.element_size() == 1 else 3)


def tile_tuning(cache: Tensor) -> AttentionTuning:
    """Tiles are limited by products: with 128 registers a thread two programs share a multiprocessor, and one multiplies while the other
    computes exponentials (measured: a quarter faster than one program without a limit)."""
    if cache.element_size() * cache.shape[3] > 256:
        return AttentionTuning(32, 8, 2)
    return AttentionTuning(64, 8, 3, 128)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _fold(
    query, cache, table, head, begin, end, last, peak, norm, mixed, scale, cap,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, KV: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold keys ``begin``..``end`` into the running softmax of ``query`` [M, DIM]: its ``peak`` and ``norm`` [M] and ``mixed`` [M, DIM].

    ``last`` [M]: the last key that each row of the query attends to; with WINDOW it attends to so many. Without MASKED, ``end`` must be a
    multiple of KEYS after ``begin``, and every row must attend to all keys. CAPPED: scores become ``cap`` * tanh(``scale`` * score).
    """
    dims = tl.arange(0, DIM)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        positions = start + tl.arange(0, KEYS)
        mask = positions < end
        if BLOCK % KEYS == 0:
            blocks = tl.load(table + start // BLOCK)
        elif MASKED:
            blocks = tl.load(table + positions // BLOCK, mask=mask, other=0)
        else:
            blocks = tl.load(table + positions // BLOCK)
        offsets = ((blocks.to(tl.int64) * BLOCK + positions % BLOCK) * (2 * KV) + head) * DIM
        # Beyond a sequence's context the cache may hold anything, and 0 * NaN is NaN: it is not loaded.
        if MASKED:
            keys = tl.load(cache + offsets[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
            values = tl.load(cache + KV * DIM + offsets[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
        else:
            keys = tl.load(cache + offsets[:, None] + dims[None, :])
            values = tl.load(cache + KV * DIM + offsets[:, None] + dims[None, :])
        scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee")
        factor = scale
        if CAPPED:
            scores, factor = cap * _tanh(scores * scale), 1.0
        if MASKED:
            scores = tl.where(positions[None, :] <= last[:, None], scores, float("-inf"))
        if WINDOW:
            scores = tl.where(positions[None, :] > last[:, None] - WINDOW, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)
        finite = higher
        if WINDOW:
            # A row whose window begins after these keys has seen none yet: -inf - -inf is NaN.
            finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - finite[:, None])
        decay = tl.exp2(peak - finite)
        norm = norm * decay + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(query.dtype), values.to(query.dtype), mixed * decay[:, None], input_precision="ieee")
        peak = higher
    return peak, norm, mixed


@triton.jit
def _merge(
    out, mixes, peaks, norms, first, parts, head, sequence,
    KV: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the attention of the ``sequence`` of the step from the partial results of its ``parts``, in their order. PAIRED: GROUP rounded
    up to a power of two; AT_ONCE: parts that are read at once."""
    dims, members = tl.arange(0, DIM), tl.arange(0, PAIRED)
    peak = tl.full([PAIRED], float("-inf"), tl.float32)
    norm = tl.zeros([PAIRED], tl.float32)
    mixed = tl.zeros([PAIRED, DIM], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        numbers = begin + tl.arange(0, AT_ONCE)
        sources = ((first + numbers) * KV + head)[:, None] * GROUP + members[None, :]
        mask = (numbers < parts)[:, None] & (members < GROUP)[None, :]
        # Other programs wrote these: .cg bypasses the first-level cache, which may hold stale values.
        found = tl.load(peaks + sources, mask=mask, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(found, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(found - finite[None, :])
        decay = tl.exp2(peak - finite)
        norm = norm * decay + tl.sum(weights * tl.load(norms + sources, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        parts_mixed = tl.load(
            mixes + sources[:, :, None] * DIM + dims[None, None, :], mask=mask[:, :, None], other=0.0, cache_modifier=".cg"
        )
        mixed = mixed * decay[:, None] + tl.sum(weights[:, :, None] * parts_mixed, 0)
        peak = higher
    targets = ((sequence * KV + head) * GROUP + members)[:, None] * DIM + dims[None, :]
    tl.store(out + targets, mixed / tl.where(norm > 0.0, norm, 1.0)[:, None], mask=(members < GROUP)[:, None])


@triton.jit(do_not_specialize=["width"])
def _decode(
    out, mixes, peaks, norms, query, cache, layout_parts, positions, tables, arrived, scale, cap, token_stride, width,
    KV: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, AT_ONCE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for one key/value head; the last part to finish merges them all. ROWS: GROUP padded to what a product takes.
    Grid: (key/value heads, parts)."""
    head, part = tl.program_id(0), tl.program_id(1)
    words = layout_parts + part * WORDS
    sequence, slot, begin, bound = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    first, parts = tl.load(words + 4), tl.load(words + 5)
    context = tl.load(positions + tl.maximum(sequence, 0)) + 1
    end = tl.minimum(bound, context)
    if WINDOW:
        # Whole iterations before the window are left out; a part may have nothing to read then.
        begin = tl.maximum(begin, tl.maximum(context - WINDOW, 0) // KEYS * KEYS)
    enter(EARLY)
    if sequence < 0:
        return
    table = tables + slot * width
    dims, members = tl.arange(0, DIM), tl.arange(0, ROWS)
    mask = (members < GROUP)[:, None]
    offsets = ((head * GROUP + members) * DIM)[:, None] + dims[None, :]
    queries = tl.load(query + sequence.to(tl.int64) * token_stride + offsets, mask=mask, other=0.0).to(KIND)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.zeros([ROWS], tl.int32) + (context - 1)
    peak, norm, mixed = _fold(
        queries, cache, table, head, begin, end, last, peak, norm, mixed, scale, cap,
        BLOCK, KEYS, DIM, KV, True, WINDOW, CAPPED, STAGES,
    )  # fmt: skip
    if parts == 1:
        tl.store(out + sequence * (KV * GROUP * DIM) + offsets, mixed / tl.where(norm > 0.0, norm, 1.0)[:, None], mask=mask)
    else:
        partial = (part * KV + head) * GROUP + members
        tl.store(peaks + partial, peak, mask=members < GROUP)
        tl.store(norms + partial, norm, mask=members < GROUP)
        tl.store(mixes + partial[:, None] * DIM + dims[None, :], mixed, mask=mask)
        # All threads store before this program counts itself, and results of others are read only after these have counted themselves.
        tl.debug_barrier()
        count = arrived + sequence * KV + head
        if tl.atomic_add(count, 1, sem="acq_rel") == parts - 1:
            _merge(out, mixes, peaks, norms, first, parts, head, sequence, KV, GROUP, PAIRED, DIM, AT_ONCE)
            tl.store(count, 0)


@triton.jit(do_not_specialize=["width"])
def _tile(
    out, query, cache, layout_tiles, tables, scale, cap, token_stride, width,
    KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Query tokens of one tile for one key/value head: rows of the product are (token, query head of the group). Grid: (key/value heads,
    tiles)."""
    head, words = tl.program_id(0), layout_tiles + tl.program_id(1) * WORDS
    first, count, slot, start = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    enter(EARLY)
    if first < 0:
        return
    table = tables + slot * width
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    tokens = rows // GROUP
    mask = (tokens < count)[:, None]
    members = (head * GROUP + rows % GROUP) * DIM
    step_tokens = (first + tokens).to(tl.int64)
    offsets = (step_tokens * token_stride + members)[:, None] + dims[None, :]
    queries = tl.load(query + offsets, mask=mask, other=0.0).to(KIND)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    last = start + tokens
    if WINDOW:
        # Iterations before the window of the first token are left out; the others have rows that attend to some of their keys only.
        seen = tl.maximum(start + 1 - WINDOW, 0) // KEYS * KEYS
    else:
        # Keys that every row attends to need no mask, as far as they fill whole iterations.
        seen = (start + 1) // KEYS * KEYS
        peak, norm, mixed = _fold(
            queries, cache, table, head, 0, seen, last, peak, norm, mixed, scale, cap,
            BLOCK, KEYS, DIM, KV, False, 0, CAPPED, STAGES,
        )  # fmt: skip
    peak, norm, mixed = _fold(
        queries, cache, table, head, seen, start + count, last, peak, norm, mixed, scale, cap,
        BLOCK, KEYS, DIM, KV, True, WINDOW, CAPPED, STAGES,
    )  # fmt: skip
    tl.store(out + (step_tokens * (KV * GROUP * DIM) + members)[:, None] + dims[None, :], mixed / norm[:, None], mask=mask)


def _product_kind(query: Tensor, cache: Tensor) -> tl.dtype:
    """The dtype that is multiplied: the model's, or fp16 with an FP8 cache, since FP8 is widened to fp16 by one instruction and to bf16 by
    many."""
    if cache.dtype == torch.float8_e4m3fn:
        return tl.float16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layout: DeviceLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    decode: AttentionTuning | None = None,
    tile: AttentionTuning | None = None,
) -> Tensor:
    """Causal softmax attention of ``query`` [T, heads, dim] (heads contiguous) over ``cache``; [T, heads * dim].

    ``scale``: of the scores; None = dim ** -0.5. ``window``, ``softcap``: as :class:`workers.kernels.Kernels` says.
    ``decode``, ``tile``: other tunings than the default ones of this device. Raises ValueError for a head dimension that is not supported.
    """
    tokens, heads, dim = query.shape
    block, kv = cache.shape[1], cache.shape[2] // 2
    if dim not in GPU_HEAD_DIMS:
        raise ValueError(f"head dimension {dim} is not one of {GPU_HEAD_DIMS}")
    out = torch.empty(tokens, heads * dim, dtype=query.dtype, device=query.device)
    tables = layout.paging.tables
    parts, tiles = len(layout.parts), len(layout.tiles)
    shared = {"KV": kv, "GROUP": heads // kv, "DIM": dim, "BLOCK": block, "KIND": _product_kind(query, cache), **early()}
    shared |= {"WINDOW": window or 0, "CAPPED": softcap is not None}
    scale = dim**-0.5 if scale is None else scale
    # Scores are powers of two; under a cap its tangent needs them as they are, and the cap is scaled instead.
    scale, cap = (scale * _LOG2E, 1.0) if softcap is None else (scale / softcap, softcap * _LOG2E)
    if parts:
        tuning = decode or decode_tuning(cache)
        paired = triton.next_power_of_2(heads // kv)
        mixes = torch.empty(parts, heads, dim, dtype=torch.float32, device=query.device)
        peaks, norms = (torch.empty(parts, heads, dtype=torch.float32, device=query.device) for _ in range(2))
        _decode[(kv, parts)](
            out, mixes, peaks, norms, query, cache, layout.parts, layout.positions, tables, layout.paging.arrived, scale, cap,
            query.stride(0), tables.stride(0), **shared, PAIRED=paired, ROWS=max(16, paired), WORDS=PART_WORDS,
            AT_ONCE=max(1, _MERGE_VALUES // (paired * dim)), **tuning.options(),
        )  # fmt: skip
    if tiles:
        tuning = tile or tile_tuning(cache)
        _tile[(kv, tiles)](
            out, query, cache, layout.tiles, tables, scale, cap, query.stride(0), tables.stride(0),
            **shared, ROWS=TILE_ROWS, WORDS=TILE_WORDS, **tuning.options(),
        )  # fmt: skip
    return out
