"""Products of linear layers with weights in every format, on a CPU; and the definition of each format, against which the GPU's products are
tested.

Owns the form in which a CPU stores weights. Must never know of ranks or layers. A product takes x [T, in] and returns x W^T + b [T, out] in
x's dtype. *Plain* weights are weights that are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from workers.protocol.specs import QuantName


class Fp8Rows(NamedTuple):
    """Rows in FP8 with a scale each: ``values`` e4m3 [T, in], ``scales`` fp32 [T, 1]."""

    values: Tensor
    scales: Tensor


#: Takes a Tensor; only an FP8 product on a GPU also takes :class:`Fp8Rows`.
Product: TypeAlias = Callable[[Any], Tensor]
#: Parts of a weight by their suffix (:func:`workers.layout.quant_parts.parts_of`).
Parts: TypeAlias = Mapping[str, Tensor]
#: (first row, row after the last) → these rows of a weight, dequantized.
Tile: TypeAlias = Callable[[int, int], Tensor]

#: The number of rows of x that plain weights are laid out for; a product takes any number.
ROWS_HINT = 16
#: Bytes of weights that are dequantized at a time: they stay in a core's second-level cache until they are multiplied.
_TILE = 1 << 19
#: Rows of x up to which torch's int8 product is the faster one on a CPU.
_FEW = 16
#: torch's integer products need inputs and outputs in multiples of this vector length.
_VECTOR = 16
FP8_MAX = 448.0


def product(form: QuantName | None, parts: Parts, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """The product with a weight whose ``parts`` are filled; the caller may drop these afterwards. ``form`` None = plain weights."""
    if form is None:
        return _plain(parts["weight"], bias)
    if form == "fp8":
        # No CPU multiplies FP8: this emulates its accuracy, at the time and memory of plain weights.
        plain = _plain(dequantize(form, parts).to(dtype), bias)
        return lambda x: plain(emulate_fp8(x))
    inner = _int8(**parts) if form == "int8" else _int4(**parts)
    return partial(_in_bf16, inner, bias)


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    """The product with plain weights, in oneDNN's blocked layout: measured on one core, 1.2 to 2.3 times as fast as torch's at 1 to 32
    rows."""
    if not torch._C._has_mkldnn or not weight.numel():
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _in_bf16(inner: Product, bias: Tensor | None, x: Tensor) -> Tensor:
    """``inner`` on bf16 inputs whatever the engine's dtype, as the names of weight-only products (W8A16, W4A16) say.

    Measured on one core, SmolLM2-135M at batch 1, tok/s: fp32 14, int8 22, int4 31 and more; bf16 23, int8 22 to 28, int4 48. For so few
    rows, dequantizing weights tile by tile would be slower than plain weights.
    """
    out = inner(x.to(torch.bfloat16).contiguous()).to(x.dtype)
    return out if bias is None else out.add_(bias)


def _int8(weight: Tensor, per_channel_scale: Tensor) -> Product:
    """Multiplies the integers, and then the sum of each output row by its scale, in fp32."""
    # torch's product takes bf16 scales, which would round them: it gets ones.
    ones = torch.ones(len(per_channel_scale), dtype=torch.bfloat16)
    many = partial(in_tiles, lambda start, stop: weight[start:stop].to(torch.bfloat16), len(weight), _TILE, None)
    if weight.shape[1] % _VECTOR:
        return lambda x: many(x) * per_channel_scale
    return lambda x: (torch._weight_int8pack_mm(x, weight, ones) if x.shape[0] <= _FEW else many(x)) * per_channel_scale


def _int4(weight: Tensor, weights_scaling_factor: Tensor, zero: Tensor) -> Product:
    rows, groups = zero.shape
    if rows % _VECTOR:
        return partial(in_tiles, partial(_int4_tile, weight, weights_scaling_factor, zero, torch.bfloat16), rows, _TILE, None)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_nibbles(weight, groups).view(rows, -1).to(torch.int32), 1)
    group, grids = weight.shape[1] * 2 // groups, torch.stack((weights_scaling_factor.t(), zero.t()), 2).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, grids)


def in_tiles(tile: Tile, rows: int, tile_bytes: int, bias: Tensor | None, x: Tensor) -> Tensor:
    """[T, rows]: the product of ``x`` with ``rows`` weight rows. Dequantizes ``tile_bytes`` of weights at a time, multiplies and drops
    them."""
    out = x.new_empty(x.shape[0], rows)
    step = max(1, tile_bytes // (x.shape[1] * x.element_size()))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(x, tile(start, stop).t(), out=out[:, start:stop])
    return out if bias is None else out.add_(bias)


def _int4_tile(weight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    values = _nibbles(weight[start:stop], scale.shape[1]).to(dtype).sub_(8)
    return values.mul_(scale[start:stop, :, None]).add_(zero[start:stop, :, None]).view(stop - start, -1)


def _nibbles(weight: Tensor, groups: int) -> Tensor:
    """The 4-bit integers of ``weight`` [rows, in / 2] uint8: [rows, groups, inputs of a group] uint8 in 0..15."""
    packed = weight.view(weight.shape[0], groups, -1)
    return torch.cat((packed & 15, packed >> 4), 2)


def dequantize(form: QuantName, parts: Parts) -> Tensor:
    """[out, in] fp32: the weight that ``parts`` stand for."""
    weight = parts["weight"]
    if form == "int4":
        return _int4_tile(weight, parts["weights_scaling_factor"], parts["zero"], torch.float32, 0, weight.shape[0])
    return weight.float() * parts["per_channel_scale"][:, None]


def to_fp8(x: Tensor) -> Fp8Rows:
    """``x`` [T, in] in FP8: each row is scaled so that its largest magnitude becomes the largest value of e4m3."""
    scale = x.abs().amax(1, keepdim=True).float().div_(FP8_MAX).clamp_(min=1e-12)
    return Fp8Rows((x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def emulate_fp8(x: Tensor) -> Tensor:
    """``x``, rounded as :func:`to_fp8` rounds it, in its own dtype."""
    values, scale = to_fp8(x)
    return (values.float() * scale).to(x.dtype)
