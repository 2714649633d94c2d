"""The tensor types of GGUF: the values and bytes of a block, and the decoding to fp32.

Owns the arithmetic of the blocks, whose results are bitwise equal to those of the format's own package. Pure functions of blocks; must
never know about files or models. The layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h

A decoder takes [blocks, bytes] uint8, contiguous, and returns [blocks, values] fp32. "A grid" below is one value of a small table for each
integer; "a super-block" is 256 values whose scales are integers themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from workers.artifacts.number_formats import Array, cast


class GgufType(NamedTuple):
    """A tensor type: its name, values a block, bytes a block, and the decoder of its blocks."""

    name: str
    values: int
    bytes: int
    decode: Callable[[Array], Array]


#: Values of a super-block.
_SUPER = 256
#: The grid of IQ4_NL and IQ4_XS, and that of MXFP4: twice the values of e2m1.
_IQ4_GRID = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1_GRID = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _half(blocks: Array, at: int) -> Array:
    """[blocks, 1] fp32: the fp16 number at byte ``at`` of each block."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _fields(packed: Array, bits: int, run: int) -> Array:
    """[blocks, values] uint8: the fields of ``bits`` bits of ``packed`` [blocks, bytes]. ``run`` bytes side by side hold the lowest fields
    of ``run`` values, then the next fields of the ``run`` values after them, and so on."""
    count, mask = 8 // bits, np.uint8((1 << bits) - 1)
    # A run is copied as one item: numpy's loop over 16 bytes would cost more than the bytes.
    item = np.dtype(f"V{run}")
    runs = np.ascontiguousarray(packed)
    out = np.empty((len(packed), packed.shape[1] // run, count), item)
    for field in range(count):
        out[:, :, field] = (runs >> np.uint8(bits * field) & mask).view(item)
    return out.view(np.uint8).reshape(len(packed), -1)


def _bits(blocks: Array, at: int) -> Array:
    """[blocks, 32] uint8, 0 or 1: the bits of four bytes from byte ``at``, the lowest first."""
    return np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")


def _in_grid(grid: Array, packed: Array) -> Array:
    """[blocks, values] fp32: the values in ``grid`` of the 4-bit integers of ``packed``."""
    # "clip" spares numpy a test of each index.
    return np.take(grid, _fields(packed, 4, 16), mode="clip")


def _grouped(values: Array, scale: Array, low: Array | None = None) -> Array:
    """[blocks, values] fp32: each group of ``values`` times its ``scale`` [blocks, groups], plus its ``low``."""
    groups = values.reshape(*scale.shape, -1).astype(np.float32, copy=False)
    groups *= scale[:, :, None]
    if low is not None:
        groups += low[:, :, None]
    return groups.reshape(len(values), -1)


def _f32(blocks: Array) -> Array:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Array) -> Array:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Array) -> Array:
    return cast(blocks.view("<u2"), "bf16", "fp32")


def _q4_0(blocks: Array) -> Array:
    return _grouped(_fields(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Array) -> Array:
    return _grouped(_fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Array) -> Array:
    values = _fields(blocks[:, 6:], 4, 16) | _bits(blocks, 2) << np.uint8(4)
    return _grouped(values.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Array) -> Array:
    values = _fields(blocks[:, 8:], 4, 16) | _bits(blocks, 4) << np.uint8(4)
    return _grouped(values, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Array) -> Array:
    return _grouped(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _q2_k(blocks: Array) -> Array:
    scales, values = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    return _grouped(values, _half(blocks, 80) * (scales & 15), -_half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Array) -> Array:
    # The mask's bit is set where the value is not lowered by 4.
    values = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << np.uint8(2)
    scales = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << np.uint8(4)
    return _grouped(values.view(np.int8) - np.int8(4), _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)))


def _scales_and_lows(blocks: Array) -> tuple[Array, Array]:
    """[blocks, 8] fp32 each, of Q4_K and Q5_K: 6-bit integers in 12 bytes times the super-block's two factors."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    lows = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * lows


def _q4_k(blocks: Array) -> Array:
    return _grouped(_fields(blocks[:, 16:], 4, 32), *_scales_and_lows(blocks))


def _q5_k(blocks: Array) -> Array:
    values = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _grouped(values, *_scales_and_lows(blocks))


def _q6_k(blocks: Array) -> Array:
    values = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return _grouped(values.view(np.int8) - np.int8(32), _half(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _iq4_nl(blocks: Array) -> Array:
    return _grouped(_in_grid(_IQ4_GRID, blocks[:, 2:]), _half(blocks, 0))


def _iq4_xs(blocks: Array) -> Array:
    high = blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = _fields(blocks[:, 4:8], 4, 1) | high.astype(np.uint8) << np.uint8(4)
    return _grouped(_in_grid(_IQ4_GRID, blocks[:, 8:]), _half(blocks, 0) * (scales.view(np.int8) - np.int8(32)))


def _mxfp4(blocks: Array) -> Array:
    # Half of the e8m0 scale, since the grid is doubled; the smallest two are denormal.
    exponent = blocks[:, :1].astype(np.uint32)
    scale = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (exponent - 1) << np.uint32(23)).astype(np.uint32).view(np.float32)
    return _grouped(_in_grid(_E2M1_GRID, blocks[:, 1:]), scale)


#: By the number of the type in a file.
GGUF_TYPES = {
    0: GgufType("F32", 1, 4, _f32),
    1: GgufType("F16", 1, 2, _f16),
    2: GgufType("Q4_0", 32, 18, _q4_0),
    3: GgufType("Q4_1", 32, 20, _q4_1),
    6: GgufType("Q5_0", 32, 22, _q5_0),
    7: GgufType("Q5_1", 32, 24, _q5_1),
    8: GgufType("Q8_0", 32, 34, _q8_0),
    10: GgufType("Q2_K", _SUPER, 84, _q2_k),
    11: GgufType("Q3_K", _SUPER, 110, _q3_k),
    12: GgufType("Q4_K", _SUPER, 144, _q4_k),
    13: GgufType("Q5_K", _SUPER, 176, _q5_k),
    14: GgufType("Q6_K", _SUPER, 210, _q6_k),
    20: GgufType("IQ4_NL", 32, 18, _iq4_nl),
    23: GgufType("IQ4_XS", _SUPER, 136, _iq4_xs),
    30: GgufType("BF16", 1, 2, _bf16),
    39: GgufType("MXFP4", 32, 17, _mxfp4),
}
#: Types that are not read, by their names in the format.
REFUSED_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip
