"""The operations of a decoder layer in plain torch: they run on a CPU, and define the results of all other kernels.

Owns the memory layout of the paged cache: one tensor a layer, [blocks, block_size, 2 * kv_heads, head_dim], keys' heads before values'
heads. Must never know about requests: it knows a step only as an :class:`AttentionLayout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from workers.kernels.linear import Fp8Rows, to_fp8
from workers.protocol.specs import Activation

Ints = npt.NDArray[np.int32]

#: Decoding sequences are computed together while the shortest context is at least this share of the longest, which bounds the padding.
_SHARE = 0.6
#: ... or while the longest context is at most this many tokens, where one more call costs more than the padding.
_SMALL = 128
#: Block tables hold a multiple of this many tokens, and in fixed-shape mode contexts are padded to a multiple of it.
TABLE_STEP = 128
#: Most query tokens that are computed together in fixed-shape mode.
_FIXED_QUERIES = 16


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """``count`` = n sequences with one query token each. ``tokens`` [n]: indices of these tokens in the step, None = the whole step in
    order; ``blocks`` [n * b]; ``mask`` [n, 1, 1, b * block_size], True = visible."""

    count: int
    tokens: Tensor | None
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """The query tokens ``start``..``stop`` of one sequence, which attend to ``context`` cached tokens, their own included. ``blocks`` [b];
    ``mask`` [stop - start, context], None = plain causal (nothing was cached before)."""

    start: int
    stop: int
    context: int
    blocks: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class ContextReads:
    """The cache reads of a step in layers with the same window."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where the T tokens of a step write (``cache_indices`` [T]: block * block_size + offset) and what they read, by the layers' window
    (None = the whole context)."""

    positions: Tensor
    cache_indices: Tensor
    reads: dict[int | None, ContextReads]


def token_positions(starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """(sequence of each token, its absolute position), each [sum of lengths] int32; ``starts``, ``lengths`` [R] as in a StepPlan."""
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first = np.cumsum(lengths, dtype=np.int32) - lengths
    return sequences, np.arange(len(sequences), dtype=np.int32) - first[sequences] + starts[sequences]


def attention_layout(
    starts: Ints, lengths: Ints, tables: Ints, block_size: int, *, grouped: bool = True, windows: tuple[int | None, ...] = (None,)
) -> AttentionLayout:
    """Layout of a step over R sequences. ``starts``, ``lengths`` [R] as in a StepPlan; ``tables`` [R, max blocks] block ids, wide
    enough for a multiple of ``TABLE_STEP`` tokens and filled up with a block of zeros. ``windows``: of the model's layers.

    ``grouped`` False (fixed-shape mode) computes every query token like a sequence of its own, whose padded context depends on its position
    alone, so that the arithmetic of a token doesn't depend on what else is in the step.
    """
    sequences, positions = token_positions(starts, lengths)
    cache_indices = tables[sequences, positions // block_size].astype(np.int64) * block_size + positions % block_size
    reads: dict[int | None, ContextReads] = {}
    for window in windows:
        chunks: list[Chunk] = []
        if grouped:
            ends = np.cumsum(lengths)
            single = lengths == 1
            decoding, decode_tokens = np.flatnonzero(single), ends[single] - 1
            for i in np.flatnonzero(~single):
                chunks.append(_chunk(int(ends[i] - lengths[i]), int(starts[i]), int(lengths[i]), tables[i], block_size, window))
            contexts, visible = _in_window(starts[decoding] + 1, tables[decoding], block_size, window)
            groups = _decode_groups(contexts, decode_tokens, visible, block_size, len(sequences), window)
        else:
            contexts, visible = _in_window(positions + 1, tables[sequences], block_size, window)
            groups = _fixed_groups(contexts, visible, block_size, window)
        reads[window] = ContextReads(groups, tuple(chunks))
    return AttentionLayout(torch.from_numpy(positions).long(), torch.from_numpy(cache_indices), reads)


def _in_window(contexts: Ints, tables: Ints, block_size: int, window: int | None) -> tuple[Ints, Ints]:
    """(contexts, tables) without the whole blocks that lie before the ``window`` of each context's last token."""
    if window is None:
        return contexts, tables
    skipped = np.maximum(contexts - window, 0) // block_size
    columns = np.minimum(np.arange(tables.shape[1], dtype=np.int32) + skipped[:, None], tables.shape[1] - 1)
    return contexts - skipped * block_size, np.take_along_axis(tables, columns, 1)


def _chunk(first: int, start: int, length: int, table: Ints, block_size: int, window: int | None) -> Chunk:
    skipped = 0 if window is None else max(0, start + 1 - window) // block_size
    start -= skipped * block_size
    context = start + length
    blocks = torch.from_numpy(table[skipped : skipped + -(-context // block_size)].astype(np.int64))
    if start == 0 and (window is None or length <= window):
        return Chunk(first, first + length, context, blocks, None)
    mask = torch.ones(length, context, dtype=torch.bool).tril_(start)
    if window is not None:
        mask.triu_(start - window + 1)
    return Chunk(first, first + length, context, blocks, mask)


def _decode_groups(
    contexts: Ints, tokens: npt.NDArray[np.int64], tables: Ints, block_size: int, total: int, window: int | None
) -> tuple[DecodeGroup, ...]:
    if not len(contexts):
        return ()
    longest, shortest = int(contexts.max()), int(contexts.min())
    if longest <= _SMALL or shortest >= _SHARE * longest:
        whole = len(contexts) == total
        return (_group(contexts, None if whole else tokens, tables, longest, block_size, window),)
    order = np.argsort(contexts, kind="stable")[::-1]
    groups: list[DecodeGroup] = []
    begin = 0
    while begin < len(order):
        longest = int(contexts[order[begin]])
        bound = 0 if longest <= _SMALL else _SHARE * longest
        count = int(np.count_nonzero(contexts[order[begin:]] >= bound))
        members = order[begin : begin + count]
        groups.append(_group(contexts[members], tokens[members], tables[members], longest, block_size, window))
        begin += count
    return tuple(groups)


def _fixed_groups(contexts: Ints, tables: Ints, block_size: int, window: int | None) -> tuple[DecodeGroup, ...]:
    """``contexts`` [T] and ``tables`` [T, blocks]: of each query token."""
    padded = -(-contexts // TABLE_STEP) * TABLE_STEP
    groups: list[DecodeGroup] = []
    for width in np.unique(padded):
        members = np.flatnonzero(padded == width)
        for begin in range(0, len(members), _FIXED_QUERIES):
            part = members[begin : begin + _FIXED_QUERIES]
            groups.append(_group(contexts[part], part, tables[part], int(width), block_size, window))
    return tuple(groups)


def _group(
    contexts: Ints, tokens: npt.NDArray[np.int64] | None, tables: Ints, width: int, block_size: int, window: int | None
) -> DecodeGroup:
    count = -(-width // block_size)
    blocks = tables[:, :count]
    places = np.arange(count * block_size, dtype=np.int32)[None, :]
    mask = places < contexts[:, None]
    if window is not None:
        mask &= places >= contexts[:, None] - window
    return DecodeGroup(
        len(contexts),
        None if tokens is None else torch.from_numpy(tokens),
        torch.from_numpy(blocks.astype(np.int64).reshape(-1)),
        torch.from_numpy(mask)[:, None, None, :],
    )


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, heads * dim]: softmax attention of ``query`` [T, heads, dim] over the cached keys and values.

    ``cache`` [blocks, block_size, 2 * kv_heads, dim] already holds this step's keys and values. ``scale``: None = dim ** -0.5.
    ``window``: one of those that the layout was made for.
    """
    total, heads, dim = query.shape
    kv, reads = cache.shape[2] // 2, layout.reads[window]
    scale = dim**-0.5 if scale is None else scale
    out: Tensor | None = None
    if len(reads.groups) != 1 or reads.groups[0].tokens is not None:
        out = query.new_empty(total, heads * dim)
    for group in reads.groups:
        chosen = query if group.tokens is None else query.index_select(0, group.tokens)
        read = cache.index_select(0, group.blocks).view(group.count, -1, 2 * kv, dim).transpose(1, 2)
        # Each sequence has one query token: the query heads of a key/value head stand where query positions would, so nothing is repeated.
        asked = chosen.view(group.count, kv, heads // kv, dim)
        result = _attend(asked, read[:, :kv], read[:, kv:], group.mask, scale, softcap).reshape(group.count, heads * dim)
        if out is None:
            return result
        assert group.tokens is not None
        out.index_copy_(0, group.tokens, result)
    assert out is not None
    for chunk in reads.chunks:
        read = cache.index_select(0, chunk.blocks).view(-1, 2 * kv, dim)[: chunk.context].transpose(0, 1)
        asked = query[chunk.start : chunk.stop].transpose(0, 1).unsqueeze(0)
        result = _attend(asked, read[:kv].unsqueeze(0), read[kv:].unsqueeze(0), chunk.mask, scale, softcap)
        out[chunk.start : chunk.stop] = result.squeeze(0).transpose(0, 1).reshape(chunk.stop - chunk.start, heads * dim)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attention of ``query`` [n, heads, q, dim] over ``keys`` and ``values`` [n, kv heads, c, dim]. ``mask``: True = visible; None = plain
    causal."""
    if softcap is None:
        grouped = query.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    kv = keys.shape[1]
    asked = query.view(query.shape[0], kv, -1, *query.shape[2:])  # [n, kv, heads of one, q, dim]
    scores = torch.matmul(asked, keys.unsqueeze(2).transpose(-1, -2)).float().mul_(scale / softcap).tanh_().mul_(softcap)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril_() if mask is None else mask
    if visible.dim() == 4:
        visible = visible.unsqueeze(2)
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1).to(values.dtype)
    return torch.matmul(weights, values.unsqueeze(2)).flatten(1, 2)


def rope_table(angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """[2, positions, n] of ``angles`` [positions, n / 2]: cosine and signed sine, each times ``factor``, so that ``x * cosine + roll(x,
    n / 2) * sine`` rotates the n components ``x``."""
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    return torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1))).to(dtype)


def rope_rows(table: Tensor, layout: AttentionLayout) -> Tensor:
    """[2, T, 1, n]: the entries of ``table`` for the step's positions."""
    return table[:, layout.positions].unsqueeze(2)


def embed(tokens: Tensor, weight: Tensor, start: int, count: int, out: Tensor) -> None:
    """Write to ``out`` [T, hidden] the rows of ``weight`` for ``tokens`` [T], zeros for ids that are not among the ``count`` from
    ``start``."""
    local = tokens - start
    mine = (local >= 0) & (local < count)
    torch.index_select(weight, 0, local.clamp_(0, max(count - 1, 0)), out=out)
    out.mul_(mine.unsqueeze(1))


def rope_store(qkv: Tensor, cache: Tensor, rope: Tensor | None, layout: AttentionLayout, norm: Tensor | None, eps: float) -> None:
    """Norm and rotate the queries and keys of ``qkv`` [T, heads + 2 * kv_heads, dim] in place; write keys and values to the cache."""
    kv = cache.shape[2] // 2
    rotated = qkv[:, : qkv.shape[1] - kv]
    if norm is not None:
        rotated.copy_(functional.rms_norm(rotated, (qkv.shape[2],), None, eps).mul_(norm))
    if rope is not None:
        rotate(rotated[..., : rope.shape[-1]], rope[0], rope[1])
    cache.view(-1, *cache.shape[2:]).index_copy_(0, layout.cache_indices, qkv[:, qkv.shape[1] - 2 * kv :])


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotary embedding in place: ``heads`` [T, n, dim]; ``cosine``, signed ``sine`` [T, 1, dim]."""
    rolled = torch.roll(heads, heads.shape[-1] // 2, -1)
    heads.mul_(cosine).addcmul_(rolled, sine)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in fp32."""
    if weight.dtype != x.dtype:
        return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``branch`` to ``residual`` in place and norm the sum."""
    if branch is not None:
        residual += branch
    return rms_norm(residual, weight, eps)


def add_layer_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Add ``branch`` to ``residual`` in place; returns the LayerNorm of the sum, computed in fp32."""
    if branch is not None:
        residual += branch
    exact = functional.layer_norm(residual.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps)
    return exact.to(residual.dtype)


def activate(x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Tensor:
    """Activation of ``x``, or with ``gated`` of the first half of its last dimension, times the second half."""
    half = x.shape[-1] // 2
    found = _ACTIVATIONS[kind](x[..., :half] if gated else x)
    return found.mul_(x[..., half:]) if gated else found


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square_(),
}


def add_rms_norm_fp8(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Fp8Rows:
    """:func:`add_rms_norm` in FP8."""
    return to_fp8(add_rms_norm(residual, branch, weight, eps))


def activate_fp8(x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Fp8Rows:
    """:func:`activate` in FP8."""
    return to_fp8(activate(x, kind, gated=gated))
