"""Products with the experts of a mixture on an NVIDIA GPU, in Triton; :mod:`.experts` defines what they mean.

Owns how rows are sorted by expert. Every grid has the size of the worst case and every loop a fixed bound, so that a step can be captured
in a graph: programs without rows return at once. Weights are the left operand of a product, as in :mod:`.linear_gpu`: a tile of few rows
then reads each expert's weights once, and pads nothing that is read. Each weight row is summed by one program, so sums have one order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.experts import Chosen, ExpertWeights
from workers.kernels.fused import activate, activate_fp8, to_fp8
from workers.kernels.launch import early, enter
from workers.kernels.linear import Fp8Rows, Parts, Product
from workers.kernels.linear_gpu import GemmTuning
from workers.layout.quant_parts import FP8_UNIT
from workers.protocol.errors import ConfigError
from workers.protocol.specs import Activation, QuantName

#: Choices that one program looks at in each iteration of its loop.
_CHUNK = 1024
#: By the rows of a tile: as many as the choices of an expert would fill on average, so that little of a tile is empty.
TUNED = {
    16: GemmTuning(64, 128, 4, 4),
    32: GemmTuning(64, 128, 4, 4),
    64: GemmTuning(128, 64, 8, 3),
    128: GemmTuning(128, 64, 8, 3),
}
#: Inputs that one program multiplies for one row at a time.
_ONE_ROW = GemmTuning(4, 512, 4, 1)


class Sorted(NamedTuple):
    """Choices, one expert's after another's: ``order`` [choices] int32, their indices; ``counts`` and ``starts`` [experts] int32, how many
    each of this rank's experts has and where they begin. Indices behind the last expert's are undefined."""

    order: Tensor
    counts: Tensor
    starts: Tensor


@triton.jit(do_not_specialize=["choices", "first"])
def _sort(order, counts, starts, experts, choices, first, CHUNK: tl.constexpr):
    """Write one expert's choices in the order of their indices. Grid: one program an expert."""
    mine = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for start in range(0, choices, CHUNK):
        index = start + tl.arange(0, CHUNK)
        expert = tl.load(experts + index, mask=index < choices, other=-1).to(tl.int32) - first
        before += tl.sum(((index < choices) & (expert >= 0) & (expert < mine)).to(tl.int32), 0)
    found = tl.zeros((), tl.int32)
    for start in range(0, choices, CHUNK):
        index = start + tl.arange(0, CHUNK)
        expert = tl.load(experts + index, mask=index < choices, other=-1).to(tl.int32) - first
        chosen = ((index < choices) & (expert == mine)).to(tl.int32)
        place = before + found + tl.cumsum(chosen, 0) - chosen
        tl.store(order + place, index, mask=chosen == 1)
        found += tl.sum(chosen, 0)
    tl.store(counts + mine, found)
    tl.store(starts + mine, before)


def sort_choices(experts: Tensor, first: int, count: int) -> Sorted:
    """Sort the choices ``experts`` [T, k] int64 by this rank's ``count`` experts from ``first``; those of other ranks are left out."""
    choices = experts.numel()
    order, counts, starts = (torch.empty(size, dtype=torch.int32, device=experts.device) for size in (choices, count, count))
    _sort[(count,)](order, counts, starts, experts, choices, first, CHUNK=_CHUNK, num_warps=4)
    return Sorted(order, counts, starts)


@triton.jit(do_not_specialize=["outs"])
def _grouped(
    out, x, x_scale, weight, scale, gains, order, counts, starts, outs, experts,
    WIDTH: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, EXPERTS: tl.constexpr,
    GATHER: tl.constexpr, SCALED: tl.constexpr, X_SCALED: tl.constexpr,
):  # fmt: skip
    """ROWS x OUTS results of x W^T with the weights of one expert. GATHER: row i of the sorted choices is row ``order[i] // EACH`` of x,
    and is written to row i; else it is row i of x, and is multiplied by ``gains`` and written to row ``order[i]``. Grid: (spans of OUTS
    weight rows, as many tiles of ROWS rows as there may be)."""
    number = tl.arange(0, EXPERTS)
    held = tl.load(counts + number, mask=number < experts, other=0)
    ends = tl.cumsum((held + ROWS - 1) // ROWS, 0)
    tile = tl.program_id(1)
    if tile >= tl.sum((held + ROWS - 1) // ROWS, 0):
        return
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    count = tl.load(counts + expert)
    inside = (tile - tl.sum(tl.where(number < expert, (held + ROWS - 1) // ROWS, 0), 0)) * ROWS + tl.arange(0, ROWS)
    some_rows = inside < count
    place = (tl.load(starts + expert) + inside).to(tl.int64)
    choice = tl.load(order + place, mask=some_rows, other=0).to(tl.int64)
    if GATHER:
        source, target = choice // EACH, place
    else:
        source, target = place, choice
    lines = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    some_lines = lines < outs
    inner = tl.arange(0, INS)
    weights = weight + (expert.to(tl.int64) * outs + lines[:, None]) * WIDTH + inner[None, :]
    inputs = x + source[None, :] * WIDTH + inner[:, None]
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for start in range(0, WIDTH, INS):
        left = inner < WIDTH - start
        w = tl.load(weights + start, mask=some_lines[:, None] & left[None, :], other=0.0)
        a = tl.load(inputs + start, mask=some_rows[None, :] & left[:, None], other=0.0)
        # Eight bits fit the mantissa of bf16 and fp16: the products are exactly those of the integers.
        total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + expert.to(tl.int64) * outs + lines, mask=some_lines, other=0.0)[:, None]
    if X_SCALED:
        total *= tl.load(x_scale + source, mask=some_rows, other=0.0)[None, :]
    if not GATHER:
        total *= tl.load(gains + choice, mask=some_rows, other=0.0)[None, :]
    tl.store(out + target[None, :] * outs + lines[:, None], total.to(out.dtype.element_ty), mask=some_lines[:, None] & some_rows[None, :])


def row_tile(choices: int, experts: int) -> int:
    """Rows of a tile: those of an average expert, within what a tensor core takes and what the registers hold."""
    average = -(-choices // experts)
    return min(max(1 << (average - 1).bit_length(), 16), 128)


def most_tiles(choices: int, experts: int, rows: int) -> int:
    """The most tiles of ``rows`` that ``choices`` can fill: each expert that has any has at most one that is not full."""
    return choices // rows + min(experts, choices)


def grouped(
    x: Tensor | Fp8Rows, parts: Parts, chosen: Sorted, out: Tensor, *, each: int, gains: Tensor | None, rows: int,
    tuning: GemmTuning | None = None,
) -> Tensor:  # fmt: skip
    """The products of ``x`` with the weights ``parts`` [E, outs, in] of the experts that its rows chose, in ``out`` [choices, outs].

    ``gains`` None: ``x`` [T, in] has a row for ``each`` choices, and ``out`` is sorted by expert. Else ``x`` [choices, in] is sorted, and
    row i of ``out`` is that of choice i, times ``gains`` [choices] fp32; rows of other ranks' choices stay as they are.
    """
    values, x_scale = x if isinstance(x, Fp8Rows) else (x, None)
    weight, scale = parts["weight"], parts.get("per_channel_scale")
    count, outs, width = weight.shape
    outs_each, ins, warps, stages = tuning or TUNED[rows]
    choices = chosen.order.shape[0]
    _grouped[(triton.cdiv(outs, outs_each), most_tiles(choices, count, rows))](
        out, values, x_scale, weight, scale, gains, chosen.order, chosen.counts, chosen.starts, outs, count,
        WIDTH=width, EACH=each, ROWS=rows, OUTS=outs_each, INS=ins, EXPERTS=triton.next_power_of_2(count), GATHER=gains is None,
        SCALED=scale is not None, X_SCALED=x_scale is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["outs", "first", "experts"])
def _one_row(
    out, x, x_scale, weight, scale, gains, chosen, outs, first, experts,
    WIDTH: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, X_SCALED: tl.constexpr,
    GAINS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTS results of one row with the weights of one expert that it chose, zeros for another rank's. SHARED: all experts have the same row
    of x. Grid: (choices, spans of OUTS weight rows)."""
    enter(EARLY)
    choice = tl.program_id(0)
    lines = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    expert = tl.load(chosen + choice) - first
    here = (expert >= 0) & (expert < experts)
    some_lines = (lines < outs) & here
    inner = tl.arange(0, INS)
    row = 0 if SHARED else choice
    weights = weight + (expert.to(tl.int64) * outs + lines[:, None]) * WIDTH + inner[None, :]
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(0, WIDTH, INS):
        left = inner < WIDTH - start
        w = tl.load(weights + start, mask=some_lines[:, None] & left[None, :], other=0.0)
        a = tl.load(x + row * WIDTH + start + inner, mask=left, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    found = tl.sum(total, 1)
    if SCALED:
        found *= tl.load(scale + expert.to(tl.int64) * outs + lines, mask=some_lines, other=0.0)
    if X_SCALED:
        found *= tl.load(x_scale + row)
    if GAINS:
        found *= tl.load(gains + choice)
    tl.store(out + choice.to(tl.int64) * outs + lines, found.to(out.dtype.element_ty), mask=lines < outs)


def one_row(x: Tensor | Fp8Rows, parts: Parts, chosen: Tensor, out: Tensor, *, first: int, gains: Tensor | None) -> Tensor:
    """:func:`grouped` for the ``chosen`` [k] experts of a single token, unsorted: ``x`` is [1, in], or [k, in] with ``gains`` [k]. Rows of
    ``out`` [k, outs] for other ranks' experts become zeros."""
    values, x_scale = x if isinstance(x, Fp8Rows) else (x, None)
    weight, scale = parts["weight"], parts.get("per_channel_scale")
    count, outs, width = weight.shape
    _one_row[(chosen.shape[0], triton.cdiv(outs, _ONE_ROW.outs))](
        out, values, x_scale, weight, scale, gains, chosen, outs, first, count,
        WIDTH=width, OUTS=_ONE_ROW.outs, INS=min(_ONE_ROW.ins, triton.next_power_of_2(width)), SHARED=gains is None,
        SCALED=scale is not None, X_SCALED=x_scale is not None, GAINS=gains is not None, **early(), num_warps=_ONE_ROW.warps,
    )  # fmt: skip
    return out


class GpuExperts:
    """Stacked weights, multiplied by grouped products. See :class:`workers.kernels.experts.MakeExperts`; raises :class:`ConfigError` for
    formats that no grouped product takes."""

    def __init__(
        self,
        form: QuantName | None,
        weights: ExpertWeights,
        dtype: torch.dtype,
        *,
        activation: Activation,
        first: int,
        tiled: Callable[[Product], Product],
    ) -> None:
        shapes = [list(part["weight"].shape[1:]) for part in weights]
        if form == "int4":
            raise ConfigError(
                "experts are not multiplied in int4 on a GPU", "there is no grouped product for it", "use --quant int8 or fp8, or a CPU"
            )
        if form == "fp8" and (dtype != torch.bfloat16 or any(size % FP8_UNIT for shape in shapes for size in shape)):
            raise ConfigError(
                f"FP8 experts need bf16 and multiples of {FP8_UNIT}, theirs are {shapes[0]} and {shapes[1]}",
                "so the GPU's instructions say",
                "use --quant int8, or fewer ranks",
            )
        self._fp8, self._weights, self._dtype = form == "fp8", weights, dtype
        self._activation, self._first, self._count = activation, first, weights.down["weight"].shape[0]

    def __call__(self, x: Tensor, chosen: Chosen) -> Tensor:
        """See :class:`workers.kernels.experts.Experts`."""
        tokens, each = chosen.experts.shape
        inner, gains = self._weights.gate_up["weight"].shape[1], chosen.weights.view(-1)
        between = torch.empty(tokens * each, inner, dtype=self._dtype, device=x.device)
        # Zeros: choices of other ranks' experts add nothing.
        out = torch.zeros(tokens * each, x.shape[1], dtype=self._dtype, device=x.device)
        given = to_fp8(x) if self._fp8 else x
        if tokens == 1:
            experts = chosen.experts.view(-1)
            one_row(given, self._weights.gate_up, experts, between, first=self._first, gains=None)
            one_row(self._activated(between), self._weights.down, experts, out, first=self._first, gains=gains)
        else:
            choices, rows = sort_choices(chosen.experts, self._first, self._count), row_tile(tokens * each, self._count)
            grouped(given, self._weights.gate_up, choices, between, each=each, gains=None, rows=rows)
            grouped(self._activated(between), self._weights.down, choices, out, each=each, gains=gains, rows=rows)
        return out.view(tokens, each, -1).sum(1)

    def _activated(self, between: Tensor) -> Tensor | Fp8Rows:
        return (activate_fp8 if self._fp8 else activate)(between, self._activation)
