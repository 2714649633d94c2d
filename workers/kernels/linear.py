"""Products of linear layers with weights in every format, on a CPU; and what each format means, which is what the GPU's are tested against.

Owns the form in which a CPU keeps weights. Must never know of ranks or layers. A product takes x [T, in] and gives x W^T + b [T, out] in
x's dtype.
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
    """Rows in FP8: ``values`` e4m3 [T, in], ``scales`` fp32 [T, 1]."""

    values: Tensor
    scales: Tensor


#: Takes a Tensor; an FP8 product on a GPU also takes :class:`Fp8Rows` rows, which nothing else is ever given.
Product: TypeAlias = Callable[[Any], Tensor]
#: Parts of a weight by their suffix (:func:`workers.layout.quant_parts.parts_of`).
Parts: TypeAlias = Mapping[str, Tensor]
#: (first row, row after the last) → these rows of a weight, plain.
Tile: TypeAlias = Callable[[int, int], Tensor]

#: The row count that plain weights are laid out for; any number of rows may follow.
ROWS_HINT = 16
#: Bytes of plain weights that are made from integers at a time: they stay in a core's second-level cache until they are multiplied with.
_TILE = 1 << 19
#: Rows up to which torch's int8 product is the faster one on a CPU.
_FEW = 16
#: What torch's integer products need: inputs and outputs in multiples of a vector.
_VECTOR = 16
FP8_MAX = 448.0


def product(form: QuantName | None, parts: Parts, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """The product with a filled weight, for good. ``form`` None = plain weights; ``parts`` may be given up afterwards."""
    if form is None:
        return _plain(parts["weight"], bias)
    if form == "fp8":
        # No CPU multiplies FP8: this shows its accuracy, in the time and memory of plain weights.
        plain = _plain(dequantize(form, parts).to(dtype), bias)
        return lambda x: plain(emulate_fp8(x))
    inner = _int8(**parts) if form == "int8" else _int4(**parts)
    return partial(_in_bf16, inner, bias)


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    """In oneDNN's blocked layout: measured on one core, 1.2 to 2.3 times the speed of a plain product at 1 to 32 rows."""
    if not torch._C._has_mkldnn or not weight.numel():
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _in_bf16(inner: Product, bias: Tensor | None, x: Tensor) -> Tensor:
    """Weight-only products take bf16 inputs whatever the engine's dtype, as their names (W8A16, W4A16) say.

    Measured on one core, SmolLM2-135M at batch 1, tok/s: fp32 14, int8 22, int4 31 and more; bf16 23, int8 22 to 28, int4 48. Weights made
    plain by the tile for so few rows would be slower than weights kept plain.
    """
    out = inner(x.to(torch.bfloat16).contiguous()).to(x.dtype)
    return out if bias is None else out.add_(bias)


def _int8(weight: Tensor, per_channel_scale: Tensor) -> Product:
    """Integers are multiplied; a row's scale meets its sum, in fp32."""
    # torch's product would round the scales to bf16, for all of a row.
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
    """The product with ``rows`` weight rows, a tile at a time: made from integers, multiplied with, and forgotten."""
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
    """[rows, groups, inputs of a group] uint8 in 0..15."""
    packed = weight.view(weight.shape[0], groups, -1)
    return torch.cat((packed & 15, packed >> 4), 2)


def dequantize(form: QuantName, parts: Parts) -> Tensor:
    """[out, in] fp32: what the parts of a weight mean."""
    weight = parts["weight"]
    if form == "int4":
        return _int4_tile(weight, parts["weights_scaling_factor"], parts["zero"], torch.float32, 0, weight.shape[0])
    return weight.float() * parts["per_channel_scale"][:, None]


def to_fp8(x: Tensor) -> Fp8Rows:
    """``x`` [T, in] narrowed: each row's largest magnitude becomes e4m3's."""
    scale = x.abs().amax(1, keepdim=True).float().div_(FP8_MAX).clamp_(min=1e-12)
    return Fp8Rows((x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def emulate_fp8(x: Tensor) -> Tensor:
    """``x`` rounded as :func:`to_fp8` rounds it, in its own dtype."""
    values, scale = to_fp8(x)
    return (values.float() * scale).to(x.dtype)
