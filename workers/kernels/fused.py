"""The operations between a decoder layer's products; each is one Triton kernel that reads and writes its tensors once.

Owns their fp32 arithmetic: values are rounded only when they are stored. Padding (position -1) stores nothing in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.linear import FP8_MAX, Fp8Rows
from workers.kernels.step_layout import DeviceLayout
from workers.protocol.specs import Activation

#: Heads that one program of :func:`rope_store` rotates.
_HEADS = 8
#: Columns that one program of :func:`embed` or :func:`activate` computes.
_COLUMNS = 1024
_FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit(do_not_specialize=["start", "count"])
def _embed(out, tokens, weight, start, count, hidden, SPAN: tl.constexpr, EARLY: tl.constexpr):
    """Grid: (tokens, spans of SPAN columns)."""
    enter(EARLY)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    row = tl.load(tokens + token) - start
    mask = columns < hidden
    found = tl.load(weight + row.to(tl.int64) * hidden + columns, mask=mask & (row >= 0) & (row < count), other=0.0)
    tl.store(out + token * hidden + columns, found, mask=mask)


def embed(tokens: Tensor, weight: Tensor, start: int, count: int, out: Tensor) -> None:
    """Write to ``out`` [T, hidden] the rows of ``weight`` [rows, hidden] for ``tokens`` [T] int32, and zeros for ids that are not among the
    ``count`` from ``start``."""
    total, hidden = out.shape
    _embed[(total, triton.cdiv(hidden, _COLUMNS))](out, tokens, weight, start, count, hidden, SPAN=_COLUMNS, **early(), num_warps=4)


@triton.jit
def _clamp_to_fp8(x):
    """fp32 ``x``, clamped to the range of FP8 (e4m3)."""
    return tl.minimum(tl.maximum(x, -_FP8_MAX), _FP8_MAX)


@triton.jit
def _store_fp8_row(values, scales, row, offsets, x, mask):
    """Store the whole row ``x`` in FP8 with its scale, as :func:`workers.kernels.linear.to_fp8` defines it."""
    scale = tl.maximum(tl.max(tl.abs(x), 0) / _FP8_MAX, 1e-12)
    tl.store(values + offsets, _clamp_to_fp8(x / scale).to(values.dtype.element_ty), mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def store_norm(normed, scales, row, offsets, x, weight, hidden, eps, mask, FP8: tl.constexpr):
    """Store the root-mean-square norm of one whole row ``x`` times fp32 ``weight``; with FP8 in that format, with its scale."""
    exact = x.to(tl.float32)
    rate = tl.rsqrt(tl.sum(exact * exact, 0) / hidden + eps)
    found = (exact * rate * weight).to(x.dtype)
    if FP8:
        _store_fp8_row(normed, scales, row, offsets, found.to(tl.float32), mask)
    else:
        tl.store(normed + offsets, found, mask=mask)


@triton.jit
def _add_rms_norm(
    normed,
    scales,
    residual,
    branch,
    weight,
    hidden,
    eps,
    ADDS: tl.constexpr,
    FP8: tl.constexpr,
    SPAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SPAN)
    mask = columns < hidden
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    enter(EARLY)
    offsets = row * hidden + columns
    x = tl.load(residual + offsets, mask=mask, other=0.0)
    if ADDS:
        # The norm uses the rounded sum, because the next stage of a pipeline has only this one.
        x = (x.to(tl.float32) + tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + offsets, x, mask=mask)
    store_norm(normed, scales, row, offsets, x, weights, hidden, eps, mask, FP8)


def _norm(normed: Tensor, scales: Tensor, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, fp8: bool) -> None:
    rows, hidden = residual.shape
    span = triton.next_power_of_2(hidden)
    _add_rms_norm[(rows,)](
        normed, scales, residual, residual if branch is None else branch, weight, hidden, eps,
        ADDS=branch is not None, FP8=fp8, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16),
    )  # fmt: skip


def add_rms_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``residual`` [T, hidden] += ``branch`` in place, rounded; returns the root-mean-square norm of the sum times ``weight`` [hidden]."""
    normed = torch.empty_like(residual)
    _norm(normed, normed, residual, branch, weight, eps, fp8=False)
    return normed


def add_rms_norm_fp8(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Fp8Rows:
    """As :func:`add_rms_norm`, with the norm in FP8."""
    found = empty_fp8_rows(residual.shape[0], residual.shape[1], residual.device)
    _norm(found.values, found.scales, residual, branch, weight, eps, fp8=True)
    return found


def empty_fp8_rows(rows: int, columns: int, device: torch.device) -> Fp8Rows:
    """Uninitialized FP8 rows [rows, columns] and their scales."""
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Rows(values, torch.empty(rows, 1, dtype=torch.float32, device=device))


@triton.jit
def _to_fp8(values, scales, x, width, SPAN: tl.constexpr, EARLY: tl.constexpr):
    """Grid: one program a row."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SPAN)
    offsets, mask = row * width + columns, columns < width
    _store_fp8_row(values, scales, row, offsets, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32), mask)


def to_fp8(x: Tensor) -> Fp8Rows:
    """As :func:`workers.kernels.linear.to_fp8`."""
    rows, columns = x.shape
    found, span = empty_fp8_rows(rows, columns, x.device), triton.next_power_of_2(columns)
    _to_fp8[(rows,)](found.values, found.scales, x, columns, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16))
    return found


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """fp32 ``x`` under the activation KIND: a member of :data:`workers.protocol.specs.Activation`."""
    if KIND == "silu":
        found = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        found = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the logistic function of 2 y.
        found = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu2")
        found = tl.maximum(x, 0.0)
        found = found * found
    return found


@triton.jit
def _activate(
    out, scales, x, width, KIND: tl.constexpr, GATED: tl.constexpr, FP8: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Grid: (rows, spans of SPAN columns); with FP8 one span holds all columns. GATED: a row has ``width`` columns to activate, then as
    many to multiply by."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    mask = columns < width
    given = x + row * (2 * width if GATED else width) + columns
    loaded = tl.load(given, mask=mask, other=0.0)
    exact = _activated(loaded.to(tl.float32), KIND)
    if GATED:
        exact = exact * tl.load(given + width, mask=mask, other=0.0).to(tl.float32)
    found = exact.to(loaded.dtype)
    if FP8:
        _store_fp8_row(out, scales, row, row * width + columns, found.to(tl.float32), mask)
    else:
        tl.store(out + row * width + columns, found, mask=mask)


def activate(x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Tensor:
    """Activation of ``x`` [T, columns]; ``gated``: [T, columns], activation(first half) * second half of ``x`` [T, 2 * columns]."""
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    _activate[(rows, triton.cdiv(columns, _COLUMNS))](
        out, out, x, columns, KIND=kind, GATED=gated, FP8=False, SPAN=_COLUMNS, **early(), num_warps=4
    )  # fmt: skip
    return out


def activate_fp8(x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Fp8Rows:
    """As :func:`activate`, in FP8: one program computes a whole row, whose scale needs all of it."""
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    found, span = empty_fp8_rows(rows, columns, x.device), triton.next_power_of_2(columns)
    _activate[(rows, 1)](
        found.values, found.scales, x, columns, KIND=kind, GATED=gated, FP8=True, SPAN=span, **early(),
        num_warps=min(max(span // 512, 1), 16),
    )  # fmt: skip
    return found


@triton.jit
def _add_layer_norm(
    normed, residual, branch, weight, bias, hidden, eps,
    ADDS: tl.constexpr, BIASED: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SPAN)
    mask = columns < hidden
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    biases = tl.zeros([SPAN], tl.float32)
    if BIASED:
        biases = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    enter(EARLY)
    offsets = row * hidden + columns
    x = tl.load(residual + offsets, mask=mask, other=0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + offsets, x, mask=mask)
    exact = x.to(tl.float32)
    centred = tl.where(mask, exact - tl.sum(exact, 0) / hidden, 0.0)
    rate = tl.rsqrt(tl.sum(centred * centred, 0) / hidden + eps)
    tl.store(normed + offsets, (centred * rate * weights + biases).to(x.dtype), mask=mask)


def add_layer_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As :func:`add_rms_norm`, with a LayerNorm of the sum."""
    normed, (rows, hidden) = torch.empty_like(residual), residual.shape
    span = triton.next_power_of_2(hidden)
    _add_layer_norm[(rows,)](
        normed, residual, residual if branch is None else branch, weight, weight if bias is None else bias, hidden, eps,
        ADDS=branch is not None, BIASED=bias is not None, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16),
    )  # fmt: skip
    return normed


def rope_table(angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """[positions, n] fp32, for every ``dtype``: cosines, then sines, of ``angles`` [positions, n / 2], each times ``factor``."""
    return torch.cat((angles.cos() * factor, angles.sin() * factor), -1)


def rope_rows(table: Tensor, layout: DeviceLayout) -> Tensor:
    """The whole table: each program reads the row of its token's position."""
    return table


@triton.jit(do_not_specialize=["width"])
def _rope_store(
    qkv, cache, table, norm, positions, slots, tables, width, eps,
    QUERIES: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, NORMS: tl.constexpr,
    FP8: tl.constexpr, ROTATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: queries are written back in place, keys and values to the cache. FP8: the cache is in that format. The
    first ROTATED components of a head are rotated. Grid: (tokens, spans of HEADS heads)."""
    token = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(positions + token), tl.load(slots + token)
    known, half = tl.maximum(position, 0), tl.arange(0, DIM // 2)
    block = tl.load(tables + slot * width + known // BLOCK).to(tl.int64)
    # A lane holds two components of each head: a pair that is rotated, or two of those that are not.
    if ROTATED == DIM:
        first, second = half, half + DIM // 2
        cosine = tl.load(table + known.to(tl.int64) * DIM + half)[None, :]
        sine = tl.load(table + known.to(tl.int64) * DIM + DIM // 2 + half)[None, :]
    else:
        turns = half < ROTATED // 2
        first = tl.where(turns, half, half + ROTATED // 2)
        second = tl.where(turns, half + ROTATED // 2, half + DIM // 2)
        cosine = tl.load(table + known.to(tl.int64) * ROTATED + half, mask=turns, other=1.0)[None, :]
        sine = tl.load(table + known.to(tl.int64) * ROTATED + ROTATED // 2 + half, mask=turns, other=0.0)[None, :]
    enter(EARLY)
    if position < 0:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offsets = ((token * (QUERIES + 2 * KV) + heads) * DIM)[:, None]
    mask = (heads < QUERIES + 2 * KV)[:, None]
    rotated = (heads < QUERIES + KV)[:, None]
    low = tl.load(qkv + offsets + first[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv + offsets + second[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORMS:
        rate = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
        weights = norm + heads[:, None] * DIM
        low = tl.where(rotated, low * rate * tl.load(weights + first[None, :], mask=rotated, other=0.0).to(tl.float32), low)
        high = tl.where(rotated, high * rate * tl.load(weights + second[None, :], mask=rotated, other=0.0).to(tl.float32), high)
    new_low = tl.where(rotated, low * cosine - high * sine, low)
    new_high = tl.where(rotated, high * cosine + low * sine, high)
    is_query = (heads < QUERIES)[:, None]
    tl.store(qkv + offsets + first[None, :], new_low, mask=is_query)
    tl.store(qkv + offsets + second[None, :], new_high, mask=is_query)
    if FP8:
        new_low, new_high = _clamp_to_fp8(new_low), _clamp_to_fp8(new_high)
    targets = (((block * BLOCK + known % BLOCK) * (2 * KV) + heads - QUERIES) * DIM)[:, None]
    is_kv = mask & (heads >= QUERIES)[:, None]
    tl.store(cache + targets + first[None, :], new_low.to(cache.dtype.element_ty), mask=is_kv)
    tl.store(cache + targets + second[None, :], new_high.to(cache.dtype.element_ty), mask=is_kv)


def rope_store(qkv: Tensor, cache: Tensor, rope: Tensor | None, layout: DeviceLayout, norm: Tensor | None, eps: float) -> None:
    """Norm and rotate the queries of ``qkv`` [T, heads + 2 * kv_heads, dim] in place; write keys, normed and rotated, and values to
    ``cache``."""
    tokens, heads, dim = qkv.shape
    kv, tables = cache.shape[2] // 2, layout.paging.tables
    _rope_store[(tokens, triton.cdiv(heads, _HEADS))](
        qkv, cache, qkv if rope is None else rope, qkv if norm is None else norm,
        layout.positions, layout.slots, tables, tables.stride(0), eps,
        QUERIES=heads - 2 * kv, KV=kv, DIM=dim, BLOCK=cache.shape[1], HEADS=_HEADS, NORMS=norm is not None,
        FP8=cache.dtype == torch.float8_e4m3fn, ROTATED=0 if rope is None else rope.shape[1], **early(), num_warps=4,
    )  # fmt: skip
