"""Number formats of weights in numpy: fp32 and fp16; bf16 and fp8 as raw bits, because numpy has no such types; integers.

Pure functions; must never know about files.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from workers.layout.quant_parts import Format
from workers.protocol.errors import ArtifactError

Array: TypeAlias = npt.NDArray[Any]

#: The numpy type of each format in memory and in files, little-endian.
STORAGE: dict[Format, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "fp8": np.dtype("u1"),
    "int32": np.dtype("<i4"),
}
#: Largest finite fp8 (e4m3).
FP8_MAX = 448.0


def cast(values: Array, source: Format, target: Format) -> Array:
    """``values`` of format ``source`` in format ``target``, rounded to nearest, ties to even. Quantized formats are never converted.

    Raises :class:`ArtifactError` where a finite weight is too large for fp16: an infinity would appear as NaN logits much later.
    """
    if source == target:
        return values
    if {source, target} - {"fp32", "bf16", "fp16"}:
        raise ValueError(f"{source} is not cast to {target}: its scales are elsewhere")
    wide = _from_bf16(values) if source == "bf16" else values.astype(np.float32)
    if target == "fp32":
        return wide
    if target == "bf16":
        return _to_bf16(wide)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if np.isinf(narrow).any() and not np.isinf(wide).any():
        raise ArtifactError("weights do not fit fp16", f"the largest is {np.abs(wide).max():g}, fp16 ends at 65504", "use bf16")
    return narrow


def _from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # A carry out of a NaN's mantissa would make it an infinity or a zero.
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_fp8(values: Array) -> Array:
    """fp32 ``values``, none beyond ``FP8_MAX``, as the bits of the nearest e4m3, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Three mantissa bits stay, and the exponent's bias changes from 127 to 7. A carry into the exponent rounds up correctly.
    normal = ((magnitude + np.uint32(0x7FFFF) + ((magnitude >> 20) & 1)) >> 20) - np.uint32(120 << 3)
    # Below 2**-6 all steps are 2**-9; eight steps give the bits of the smallest normal number.
    small = np.rint(np.abs(values) * np.float32(512)).astype(np.uint32)
    rounded: Array = np.where(magnitude < 0x3C800000, small, normal) | (bits >> 24 & np.uint32(0x80))
    return rounded.astype(np.uint8)


def _fp8_values() -> Array:
    """[256] fp32: the value of every e4m3; there are no infinities, and two NaNs."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7).astype(np.float32)
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -size, size).astype(np.float32)


_FP8_VALUES = _fp8_values()


def from_fp8(bits: Array) -> Array:
    """The fp32 values of e4m3 ``bits``."""
    found: Array = _FP8_VALUES[bits]
    return found
