"""Choosing tokens in Triton: greedy and plain temperature, the common case, without leaving the device or reading the logits twice.

Owns the kernels' form of :mod:`workers.core.params`' definition: the same noise bits, ties to the lowest id. A row's best candidate is four
int32 words: bits of the score, id, bits of the raw logit, and whether a logit is NaN or infinite. Must never take a row with penalties,
masks, top-k, top-p or min-p: those are torch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.core.params import MIX_A, MIX_B

#: Candidates that one program scores.
_CANDIDATES = 2048
_MIX_A, _MIX_B = tl.constexpr(MIX_A), tl.constexpr(MIX_B)
_UNIT, _HALF_UNIT, _BELOW_ONE = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33), tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= _MIX_A
    x ^= x >> 15
    x *= _MIX_B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(bits):
    """-log(-log1p(-w)) of uniform 32-bit ``bits``; log1p as log(u) * x / (u - 1), which is exact to a few ulps where u = 1 + x rounds."""
    w = tl.minimum(bits.to(tl.float32) * _UNIT + _HALF_UNIT, _BELOW_ONE)
    u = 1.0 - w
    gap = 1.0 - u
    return -tl.log(tl.where(gap == 0.0, w, -tl.log(u) * (w / tl.where(gap == 0.0, 1.0, gap))))


@triton.jit(do_not_specialize=["start"])
def _candidates(best, logits, seeds, temperatures, positions, rows, start, SPAN: tl.constexpr):
    part, row, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    ids = part * SPAN + tl.arange(0, SPAN)
    raw = tl.load(logits + row.to(tl.int64) * rows + ids, mask=ids < rows, other=float("-inf")).to(tl.float32)
    broken = (raw != raw) | (raw == float("inf"))
    scores = tl.where(broken, float("-inf"), raw)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        a = tl.load(seeds + 2 * row).to(tl.uint32, bitcast=True)
        b = tl.load(seeds + 2 * row + 1).to(tl.uint32, bitcast=True)
        k = _mix((tl.load(positions + row) + 1).to(tl.uint32) + b)
        bits = _mix(_mix((start + ids).to(tl.uint32) + k) ^ _mix(k ^ a))
        scores = tl.div_rn(scores, temperature) + _gumbel(bits)
    # Of equal scores the first: its id is the lowest.
    place = tl.argmax(scores, 0)
    taken = tl.arange(0, SPAN) == place
    line = best + part * 4 * count + row
    tl.store(line, tl.max(scores, 0).to(tl.int32, bitcast=True))
    tl.store(line + count, start + part * SPAN + place)
    tl.store(line + 2 * count, tl.max(tl.where(taken, raw, float("-inf")), 0).to(tl.int32, bitcast=True))
    tl.store(line + 3 * count, tl.max(broken.to(tl.int32), 0))


def candidates(logits: Tensor, seeds: Tensor, temperatures: Tensor, positions: Tensor, start: int) -> Tensor:
    """[n, 4, S] int32: the best candidate of each part of ``logits`` [S, rows] (any float, -inf = never), parts in order of their ids.

    Args:
        seeds: [S, 2] int32, the bits of :func:`workers.core.params.seed_keys`.
        temperatures: [S] fp32, 0 = greedy.
        positions: [S] int32 of the query tokens that these logits follow; the new tokens take the next ones.
        start: vocabulary id of the first column.
    """
    count, rows = logits.shape
    parts = triton.cdiv(rows, _CANDIDATES)
    best = torch.empty(parts, 4, count, dtype=torch.int32, device=logits.device)
    _candidates[(parts, count)](best, logits, seeds, temperatures, positions, rows, start, SPAN=_CANDIDATES, num_warps=4)
    return best


@triton.jit(do_not_specialize=["parts"])
def _winners(out, best, parts, SPAN: tl.constexpr, FINAL: tl.constexpr):
    """The best of ``parts`` candidates of one row. FINAL: the token, or -1, and its raw logit; else a candidate."""
    row, count = tl.program_id(0), tl.num_programs(0)
    numbers = tl.arange(0, SPAN)
    there = numbers < parts
    lines = best + numbers * 4 * count + row
    scores = tl.load(lines, mask=there, other=0).to(tl.float32, bitcast=True)
    scores = tl.where(there, scores, float("-inf"))
    taken = numbers == tl.argmax(scores, 0)
    token = tl.sum(tl.where(taken, tl.load(lines + count, mask=there, other=0), 0), 0)
    raw = tl.sum(tl.where(taken, tl.load(lines + 2 * count, mask=there, other=0), 0), 0)
    broken = tl.max(tl.load(lines + 3 * count, mask=there, other=0), 0)
    top = tl.max(scores, 0)
    if FINAL:
        tl.store(out + row, tl.where((broken != 0) | (top == float("-inf")), -1, token))
        tl.store(out + count + row, raw)
    else:
        tl.store(out + row, top.to(tl.int32, bitcast=True))
        tl.store(out + count + row, token)
        tl.store(out + 2 * count + row, raw)
        tl.store(out + 3 * count + row, broken)


def merged(best: Tensor) -> Tensor:
    """[4, S]: the best of ``best`` [n, 4, S], for one message between ranks."""
    parts, words, count = best.shape
    out = torch.empty(words, count, dtype=torch.int32, device=best.device)
    _winners[(count,)](out, best, parts, SPAN=triton.next_power_of_2(parts), FINAL=False, num_warps=1)
    return out


def winners(best: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [S] int32, raw logits [S] fp32) of candidates ``best`` [n, 4, S] in order of their ids; -1 where a logit is NaN or +inf, or
    none is finite."""
    parts, _, count = best.shape
    out = torch.empty(2, count, dtype=torch.int32, device=best.device)
    _winners[(count,)](out, best, parts, SPAN=triton.next_power_of_2(parts), FINAL=True, num_warps=1)
    return out[0], out[1].view(torch.float32)
