"""The product of a single row with unquantized weights, in Triton: a decode step of one request consists of these.

Owns the way in which such a product reads its weights, which is all of its cost. A program loads its first weights before it waits for the
previous kernels, so that memory is never idle between two products. Each weight row is summed by one program, so sums have one order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter


class GemvTile(NamedTuple):
    """What one program multiplies in each iteration of its loop: ``outs`` weight rows and ``ins`` inputs of each; and its warps."""

    outs: int
    ins: int
    warps: int


@triton.jit
def _gemv(
    out, x, weight, bias, outs,
    WIDTH: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, BIASES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTS results of x W^T + b over WIDTH inputs. Grid: one program for each OUTS weight rows."""
    lines = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    inner = tl.arange(0, INS)
    mask = (lines < outs)[:, None]
    sources = weight + lines[:, None].to(tl.int64) * WIDTH + inner[None, :]
    # Nothing else reads these weights in this step: they need not stay in a cache.
    w = tl.load(sources, mask=mask & (inner < WIDTH)[None, :], other=0.0, eviction_policy="evict_first")
    enter(EARLY)
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(0, WIDTH, INS):
        rest = mask & (inner < WIDTH - INS - start)[None, :]
        following = tl.load(sources + start + INS, mask=rest, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + start + inner, mask=inner < WIDTH - start, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
        w = following
    found = tl.sum(total, 1)
    if BIASES:
        found += tl.load(bias + lines, mask=lines < outs, other=0.0).to(tl.float32)
    tl.store(out + lines, found.to(out.dtype.element_ty), mask=lines < outs)


def tile_for(weight: Tensor) -> GemvTile:
    """Two weight rows, 4 KiB of each or less where they are shorter: 64 bytes in flight for each thread. The best of 11 measured (H100, 8B,
    bf16)."""
    return GemvTile(2, min(4096 // weight.element_size(), triton.next_power_of_2(weight.shape[1])), 4)


def gemv(weight: Tensor, bias: Tensor | None, x: Tensor, tile: GemvTile | None = None) -> Tensor:
    """[1, out] in x's dtype, rounded once: ``x`` [1, in] times ``weight`` [out, in], plus ``bias`` [out]."""
    outs, width = weight.shape
    outs_each, ins, warps = tile or tile_for(weight)
    out = torch.empty(1, outs, dtype=x.dtype, device=x.device)
    _gemv[(triton.cdiv(outs, outs_each),)](
        out, x, weight, bias, outs, WIDTH=width, OUTS=outs_each, INS=ins, BIASES=bias is not None, **early(), num_warps=warps
    )
    return out
