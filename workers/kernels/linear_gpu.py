"""Products of linear layers on an NVIDIA GPU: for few rows Triton kernels read the quantized weights once, for many rows torch's GEMMs
compute.

Owns the form in which a GPU stores weights, and the row counts at which the method changes. :mod:`.linear` defines the products. Weights
are the left operand of every Triton product: they always have enough rows to fill a tensor core's 64, and the rows of the step are the
short side. Each weight row is summed by one program from end to end, so sums have one order.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from workers.kernels.fused import to_fp8
from workers.kernels.gemv import gemv
from workers.kernels.launch import early, enter, prefetch
from workers.kernels.linear import Fp8Rows, Parts, Product, in_tiles
from workers.layout.quant_parts import FP8_UNIT
from workers.protocol.errors import ConfigError
from workers.protocol.specs import QuantName


class GemmTuning(NamedTuple):
    """The tile of a program: ``outs`` weight rows, ``ins`` inputs in each iteration of its loop; and its warps and pipeline stages."""

    outs: int
    ins: int
    warps: int
    stages: int


#: The tuning by format, then by the rows of x in a program's tile.
TUNED: dict[QuantName, dict[int, GemmTuning]] = {
    "int8": {16: GemmTuning(32, 256, 4, 4), 32: GemmTuning(32, 256, 4, 4), 64: GemmTuning(64, 128, 4, 4), 128: GemmTuning(128, 64, 8, 4)},
    "fp8": dict.fromkeys((16, 32, 64, 128), GemmTuning(64, 256, 4, 4)),
}
#: Rows of x up to which Triton's product is the faster one, by format. Four-bit weights are dequantized for any number of rows: a kernel
#: that multiplied their integers took, for one row, 1.3 to 2.8 times as long as dequantizing takes for 128 rows, and 3 to 6 times for 128.
FEW: dict[QuantName, int] = {"int8": 256, "fp8": 64}
#: Bytes of weights that are dequantized at a time for products with many rows: few launches, and little memory.
_TILE = 1 << 26
#: Weights that one program dequantizes.
_SPAN = 4096


def product(form: QuantName | None, parts: Parts, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """As :func:`workers.kernels.linear.product`. Raises :class:`ConfigError` for dtypes and shapes that FP8 instructions do not take."""
    weight = parts["weight"]
    if form is None:
        return lambda x: gemv(weight, bias, x) if x.shape[0] == 1 else functional.linear(x, weight, bias)
    if form == "fp8":
        if dtype != torch.bfloat16:
            raise ConfigError(
                "FP8 products are made in bf16 on a GPU", f"the engine computes in {dtype}".replace("torch.", ""), "use --dtype bf16"
            )
        if any(size % FP8_UNIT for size in weight.shape):
            raise ConfigError(
                f"FP8 products need multiples of {FP8_UNIT}, a weight is {list(weight.shape)}", "so the GPU's instructions say", "use int8"
            )
        return _Fp8(weight, parts["per_channel_scale"], bias, dtype)
    if form == "int4":
        plain = partial(int4_rows, weight, parts["weights_scaling_factor"], parts["zero"], dtype)
        return partial(in_tiles, plain, weight.shape[0], _TILE, bias)
    few = partial(int8_few, weight, parts["per_channel_scale"], bias)
    many = partial(in_tiles, partial(int8_rows, weight, parts["per_channel_scale"], dtype), weight.shape[0], _TILE, bias)
    return lambda x: (few if x.shape[0] <= FEW["int8"] else many)(x)


class _Fp8:
    """W8A8: each row of x gets the scale that maps its largest magnitude to the largest value of e4m3."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._scale, self._bias, self._dtype = weight, scale, bias, dtype

    def __call__(self, x: Tensor | Fp8Rows) -> Tensor:
        values, scale = x if isinstance(x, Fp8Rows) else to_fp8(x)
        if values.shape[0] <= FEW["fp8"]:
            return fp8_few(self._weight, self._scale, self._bias, values, scale, self._dtype)
        # Fast accumulation sums in about 14 bits in the tensor core: an eighth faster, and far finer than the FP8 inputs.
        return torch._scaled_mm(
            values,
            self._weight.t(),
            scale_a=scale,
            scale_b=self._scale[None, :],
            bias=self._bias,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )


@triton.jit(do_not_specialize=["rows"])
def _scaled(
    out, x, x_scale, weight, scale, bias, rows, outs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    X_SCALED: tl.constexpr, BIASES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS x OUTS results of x W^T over WIDTH inputs. Each weight row has a scale; with X_SCALED each row of x has one too. AHEAD: how many
    inputs of the weights are prefetched into the cache while the kernels before this one end. Grid: (spans of OUTS weight rows, spans of
    ROWS rows of x)."""
    lines = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    if AHEAD:
        prefetch(weight + tl.minimum(lines, outs - 1).to(tl.int64) * WIDTH, AHEAD, EARLY)
    enter(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INS)
    some_lines, some_rows = (lines < outs)[:, None], (row < rows)[None, :]
    weights = weight + lines[:, None].to(tl.int64) * WIDTH + inner[None, :]
    inputs = x + row[None, :].to(tl.int64) * WIDTH + inner[:, None]
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for start in range(0, WIDTH, INS):
        if WIDTH % INS == 0:
            w = tl.load(weights + start, mask=some_lines, other=0.0)
            a = tl.load(inputs + start, mask=some_rows, other=0.0)
        else:
            left = inner < WIDTH - start
            w = tl.load(weights + start, mask=some_lines & left[None, :], other=0.0)
            a = tl.load(inputs + start, mask=some_rows & left[:, None], other=0.0)
        # Eight bits fit the mantissa of bf16 and fp16: the products are exactly those of the integers.
        total = tl.dot(w.to(a.dtype), a, total)
    total *= tl.load(scale + lines, mask=lines < outs, other=0.0)[:, None]
    if X_SCALED:
        total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
    if BIASES:
        total += tl.load(bias + lines, mask=lines < outs, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[None, :].to(tl.int64) * outs + lines[:, None], total.to(out.dtype.element_ty), mask=some_lines & some_rows)


def int8_few(weight: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor, tuning: GemmTuning | None = None) -> Tensor:
    """[T, out] in x's dtype: ``x`` [T, in] times int8 ``weight`` [out, in] with ``scale`` [out] fp32, plus ``bias`` [out]."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return _launch_scaled(out, x, None, weight, scale, bias, tuning or _tuned("int8", x))


def fp8_few(
    weight: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor, x_scale: Tensor, dtype: torch.dtype, tuning: GemmTuning | None = None
) -> Tensor:
    """[T, out] in ``dtype``: e4m3 ``x`` [T, in] with ``x_scale`` [T, 1] times e4m3 ``weight`` [out, in] with ``scale`` [out] fp32, plus
    ``bias`` [out]."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    return _launch_scaled(out, x, x_scale, weight, scale, bias, tuning or _tuned("fp8", x))


def _launch_scaled(
    out: Tensor, x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, tuning: GemmTuning
) -> Tensor:
    (rows, width), lines = x.shape, weight.shape[0]
    tile = _row_tile(rows)
    ahead = 0 if width % 16 else min(tuning.ins * tuning.stages, width)
    _scaled[(triton.cdiv(lines, tuning.outs), triton.cdiv(rows, tile))](
        out, x, x_scale, weight, scale, bias, rows, lines,
        WIDTH=width, ROWS=tile, OUTS=tuning.outs, INS=tuning.ins,
        X_SCALED=x_scale is not None, BIASES=bias is not None, AHEAD=ahead, **early(), num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return out


def _row_tile(rows: int) -> int:
    """Rows of x in one program: at least what a tensor core takes, at most what the registers hold."""
    return min(max(1 << (rows - 1).bit_length(), 16), 128)


def _tuned(form: QuantName, x: Tensor) -> GemmTuning:
    return TUNED[form][_row_tile(x.shape[0])]


@triton.jit
def _int8_rows(out, weight, scale, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Grid: (weight rows, spans of SPAN inputs)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    mask = columns < WIDTH
    values = tl.load(weight + row * WIDTH + columns, mask=mask, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), mask=mask)


def int8_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """[stop - start, in] of ``dtype``: rows ``start``..``stop`` of int8 ``weight`` [out, in], dequantized with ``scale`` [out] fp32."""
    width = weight.shape[1]
    out = torch.empty(stop - start, width, dtype=dtype, device=weight.device)
    _int8_rows[(stop - start, triton.cdiv(width, _SPAN))](out, weight[start:stop], scale[start:stop], WIDTH=width, SPAN=_SPAN, num_warps=8)
    return out


@triton.jit
def _int4_rows(out, weight, scale, zero, GROUPS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """Grid: (weight rows, spans of SPAN groups)."""
    half: tl.constexpr = GROUP // 2
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    mask = (group < GROUPS)[:, None]
    inner = tl.arange(0, half)[None, :]
    packed = tl.load(weight + row * (GROUPS * half) + group[:, None] * half + inner, mask=mask, other=0)
    step = tl.load(scale + row * GROUPS + group, mask=group < GROUPS, other=0.0).to(tl.float32)[:, None]
    offset = tl.load(zero + row * GROUPS + group, mask=group < GROUPS, other=0.0).to(tl.float32)[:, None]
    low = ((packed & 15).to(tl.float32) - 8) * step + offset
    high = ((packed >> 4).to(tl.float32) - 8) * step + offset
    targets = out + row * (GROUPS * GROUP) + group[:, None] * GROUP + inner
    tl.store(targets, low.to(out.dtype.element_ty), mask=mask)
    tl.store(targets + half, high.to(out.dtype.element_ty), mask=mask)


def int4_rows(weight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """[stop - start, in] of ``dtype``: rows ``start``..``stop`` of a 4-bit ``weight`` [out, in / 2] uint8, dequantized with ``scale`` and
    ``zero`` [out, groups]."""
    groups, group = scale.shape[1], 2 * weight.shape[1] // scale.shape[1]
    out = torch.empty(stop - start, groups * group, dtype=dtype, device=weight.device)
    span = _SPAN // group
    _int4_rows[(stop - start, triton.cdiv(groups, span))](
        out, weight[start:stop], scale[start:stop], zero[start:stop], GROUPS=groups, GROUP=group, SPAN=span, num_warps=8
    )
    return out
