"""The operations between a decoder layer's products, each one Triton kernel that reads and writes its tensors once.

Owns their fp32 arithmetic: values are rounded where they are stored and nowhere else. Must never look at what it was not given: padding
(position -1) stores nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.linear import FP8_MAX, Fp8Rows
from workers.kernels.step_layout import DeviceLayout

#: Heads that one program of :func:`rope_store` turns.
_HEADS = 8
#: Columns that one program of :func:`embed` or :func:`silu_mul` computes.
_COLUMNS = 1024
_FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit(do_not_specialize=["start", "count"])
def _embed(out, tokens, weight, start, count, hidden, SPAN: tl.constexpr, EARLY: tl.constexpr):
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    line = tl.load(tokens + row) - start
    there = place < hidden
    found = tl.load(weight + line.to(tl.int64) * hidden + place, mask=there & (line >= 0) & (line < count), other=0.0)
    tl.store(out + row * hidden + place, found, mask=there)


def embed(tokens: Tensor, weight: Tensor, start: int, count: int, out: Tensor) -> None:
    """The lines of ``weight`` for ``tokens`` [T] int32, zeros for ids that are not among the ``count`` from ``start``."""
    rows, hidden = out.shape
    _embed[(rows, triton.cdiv(hidden, _COLUMNS))](out, tokens, weight, start, count, hidden, SPAN=_COLUMNS, **early(), num_warps=4)


@triton.jit
def _narrowed(x):
    """fp32 ``x`` within what an FP8 value can be."""
    return tl.minimum(tl.maximum(x, -_FP8_MAX), _FP8_MAX)


@triton.jit
def _store_narrow(values, scales, row, line, x, there):
    """One whole row ``x``, as :func:`workers.kernels.linear.to_fp8` defines it."""
    scale = tl.maximum(tl.max(tl.abs(x), 0) / _FP8_MAX, 1e-12)
    tl.store(values + line, _narrowed(x / scale).to(values.dtype.element_ty), mask=there)
    tl.store(scales + row, scale)


@triton.jit
def store_norm(normed, scales, row, line, x, rates, hidden, eps, there, NARROWS: tl.constexpr):
    """The norm of one whole row ``x`` times fp32 ``rates``, narrowed if it is to be."""
    exact = x.to(tl.float32)
    rate = tl.rsqrt(tl.sum(exact * exact, 0) / hidden + eps)
    found = (exact * rate * rates).to(x.dtype)
    if NARROWS:
        _store_narrow(normed, scales, row, line, found.to(tl.float32), there)
    else:
        tl.store(normed + line, found, mask=there)


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
    NARROWS: tl.constexpr,
    SPAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SPAN)
    there = columns < hidden
    rates = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    enter(EARLY)
    line = row * hidden + columns
    x = tl.load(residual + line, mask=there, other=0.0)
    if ADDS:
        # The norm is of the rounded sum: the next stage of a pipeline has no other.
        x = (x.to(tl.float32) + tl.load(branch + line, mask=there, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + line, x, mask=there)
    store_norm(normed, scales, row, line, x, rates, hidden, eps, there, NARROWS)


def _norm(normed: Tensor, scales: Tensor, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, narrows: bool) -> None:
    rows, hidden = residual.shape
    span = triton.next_power_of_2(hidden)
    _add_rms_norm[(rows,)](
        normed, scales, residual, residual if branch is None else branch, weight, hidden, eps,
        ADDS=branch is not None, NARROWS=narrows, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16),
    )  # fmt: skip


def add_rms_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``residual`` [T, hidden] += ``branch`` in place, rounded; returns the norm of the sum times ``weight``."""
    normed = torch.empty_like(residual)
    _norm(normed, normed, residual, branch, weight, eps, narrows=False)
    return normed


def add_rms_norm_narrow(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Fp8Rows:
    """As :func:`add_rms_norm`, narrowed."""
    found = empty_narrow(residual.shape[0], residual.shape[1], residual.device)
    _norm(found.values, found.scales, residual, branch, weight, eps, narrows=True)
    return found


def empty_narrow(rows: int, columns: int, device: torch.device) -> Fp8Rows:
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Rows(values, torch.empty(rows, 1, dtype=torch.float32, device=device))


@triton.jit
def _to_fp8(values, scales, x, columns, SPAN: tl.constexpr, EARLY: tl.constexpr):
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SPAN)
    line, there = row * columns + place, place < columns
    _store_narrow(values, scales, row, line, tl.load(x + line, mask=there, other=0.0).to(tl.float32), there)


def to_fp8(x: Tensor) -> Fp8Rows:
    """As :func:`workers.kernels.linear.to_fp8`."""
    rows, columns = x.shape
    found, span = empty_narrow(rows, columns, x.device), triton.next_power_of_2(columns)
    _to_fp8[(rows,)](found.values, found.scales, x, columns, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16))
    return found


@triton.jit
def _silu_mul(out, scales, gate_up, columns, NARROWS: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr):
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    there = place < columns
    both = gate_up + row * (2 * columns) + place
    gate = tl.load(both, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both + columns, mask=there, other=0.0)
    found = (gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)).to(up.dtype)
    if NARROWS:
        _store_narrow(out, scales, row, row * columns + place, found.to(tl.float32), there)
    else:
        tl.store(out + row * columns + place, found, mask=there)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(first half) * second half of ``gate_up`` [T, 2 * columns]."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(columns, _COLUMNS))](out, out, gate_up, columns, NARROWS=False, SPAN=_COLUMNS, **early(), num_warps=4)
    return out


def silu_mul_narrow(gate_up: Tensor) -> Fp8Rows:
    """As :func:`silu_mul`, narrowed: a row's scale needs the whole row in one program."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    found, span = empty_narrow(rows, columns, gate_up.device), triton.next_power_of_2(columns)
    _silu_mul[(rows, 1)](
        found.values, found.scales, gate_up, columns, NARROWS=True, SPAN=span, **early(), num_warps=min(max(span // 512, 1), 16)
    )  # fmt: skip
    return found


def rope_table(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """[positions, dim] fp32 whatever ``dtype``: cosines, then sines, of ``angles`` [positions, dim / 2]."""
    return torch.cat((angles.cos(), angles.sin()), -1)


def rope_rows(table: Tensor, layout: DeviceLayout) -> Tensor:
    """The whole table: each program reads its token's row."""
    return table


@triton.jit(do_not_specialize=["width"])
def _rope_store(
    qkv, cache, table, norm, positions, slots, tables, width, eps,
    QUERIES: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, NORMS: tl.constexpr,
    NARROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: queries go back to where they were, keys and values to the cache."""
    token = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(positions + token), tl.load(slots + token)
    place, half = tl.maximum(position, 0), tl.arange(0, DIM // 2)
    block = tl.load(tables + slot * width + place // BLOCK).to(tl.int64)
    cosine = tl.load(table + place.to(tl.int64) * DIM + half)[None, :]
    sine = tl.load(table + place.to(tl.int64) * DIM + DIM // 2 + half)[None, :]
    enter(EARLY)
    if position < 0:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lines = ((token * (QUERIES + 2 * KV) + heads) * DIM)[:, None] + half[None, :]
    there = (heads < QUERIES + 2 * KV)[:, None]
    turns = (heads < QUERIES + KV)[:, None]
    low = tl.load(qkv + lines, mask=there, other=0.0).to(tl.float32)
    high = tl.load(qkv + lines + DIM // 2, mask=there, other=0.0).to(tl.float32)
    if NORMS:
        rate = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
        weights = norm + heads[:, None] * DIM + half[None, :]
        low = tl.where(turns, low * rate * tl.load(weights, mask=turns, other=0.0).to(tl.float32), low)
        high = tl.where(turns, high * rate * tl.load(weights + DIM // 2, mask=turns, other=0.0).to(tl.float32), high)
    turned_low = tl.where(turns, low * cosine - high * sine, low)
    turned_high = tl.where(turns, high * cosine + low * sine, high)
    asks = (heads < QUERIES)[:, None]
    tl.store(qkv + lines, turned_low, mask=asks)
    tl.store(qkv + lines + DIM // 2, turned_high, mask=asks)
    if NARROWS:
        turned_low, turned_high = _narrowed(turned_low), _narrowed(turned_high)
    kept = (((block * BLOCK + place % BLOCK) * (2 * KV) + heads - QUERIES) * DIM)[:, None] + half[None, :]
    keeps = there & (heads >= QUERIES)[:, None]
    tl.store(cache + kept, turned_low.to(cache.dtype.element_ty), mask=keeps)
    tl.store(cache + kept + DIM // 2, turned_high.to(cache.dtype.element_ty), mask=keeps)


def rope_store(qkv: Tensor, cache: Tensor, rope: Tensor, layout: DeviceLayout, norm: Tensor | None, eps: float) -> None:
    """Norm and turn the queries of ``qkv`` [T, heads + 2 * kv_heads, dim] in place; write turned keys and values to ``cache``."""
    tokens, heads, dim = qkv.shape
    kv, tables = cache.shape[2] // 2, layout.paging.tables
    _rope_store[(tokens, triton.cdiv(heads, _HEADS))](
        qkv, cache, rope, qkv if norm is None else norm, layout.positions, layout.slots, tables, tables.stride(0), eps,
        QUERIES=heads - 2 * kv, KV=kv, DIM=dim, BLOCK=cache.shape[1], HEADS=_HEADS, NORMS=norm is not None,
        NARROWS=cache.dtype == torch.float8_e4m3fn, **early(), num_warps=4,
    )  # fmt: skip
