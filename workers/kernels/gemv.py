"""The product of one row with plain weights, in Triton: what a decode step of a single request is made of.

Owns how such a product reads its weights, which is all that it costs. A program asks for its first weights before it waits for the kernels
before it, so that memory never stands idle between two products. One line of a weight is summed by one program, so sums have one order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter


class Tile(NamedTuple):
    """What one program multiplies a turn of its loop: weight lines, inputs of each; and its warps."""

    outs: int
    ins: int
    warps: int


@triton.jit
def _one_row(
    out, x, weight, bias, outs,
    WIDTH: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, BIASES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTS results of x W^T + b over WIDTH inputs."""
    lines = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    inner = tl.arange(0, INS)
    some = (lines < outs)[:, None]
    places = weight + lines[:, None].to(tl.int64) * WIDTH + inner[None, :]
    # Nothing else reads these weights in this step: they need no place in a cache.
    w = tl.load(places, mask=some & (inner < WIDTH)[None, :], other=0.0, eviction_policy="evict_first")
    enter(EARLY)
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(0, WIDTH, INS):
        rest = some & (inner < WIDTH - INS - start)[None, :]
        following = tl.load(places + start + INS, mask=rest, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + start + inner, mask=inner < WIDTH - start, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
        w = following
    found = tl.sum(total, 1)
    if BIASES:
        found += tl.load(bias + lines, mask=lines < outs, other=0.0).to(tl.float32)
    tl.store(out + lines, found.to(out.dtype.element_ty), mask=lines < outs)


def tile_for(weight: Tensor) -> Tile:
    """Two lines of 4 KiB, or of what there is: 64 bytes on their way to each thread. The best of 11 measured (H100, 8B, bf16)."""
    return Tile(2, min(4096 // weight.element_size(), triton.next_power_of_2(weight.shape[1])), 4)


def one_row(weight: Tensor, bias: Tensor | None, x: Tensor, tile: Tile | None = None) -> Tensor:
    """``x`` [1, in] times ``weight`` [out, in], plus ``bias`` [out]: [1, out] in x's dtype, rounded once."""
    outs, width = weight.shape
    outs_each, ins, warps = tile or tile_for(weight)
    out = torch.empty(1, outs, dtype=x.dtype, device=x.device)
    _one_row[(triton.cdiv(outs, outs_each),)](
        out, x, weight, bias, outs, WIDTH=width, OUTS=outs_each, INS=ins, BIASES=bias is not None, **early(), num_warps=warps
    )
    return out
