"""Number formats of weights in numpy: fp32, fp16, and bf16 as its raw 16 bits (numpy has no such type).

Pure functions; must never know about files.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from workers.errors import ArtifactError
from workers.spec import DType

Array: TypeAlias = npt.NDArray[Any]

#: How each format lies in memory and in files, little-endian.
STORAGE: dict[DType, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "fp16": np.dtype("<f2")}


def cast(values: Array, source: DType, target: DType) -> Array:
    """``values`` of format ``source`` in format ``target``, rounded to nearest, ties to even.

    Raises :class:`ArtifactError` where a finite weight is too large for fp16: an infinity would surface as NaN logits much later.
    """
    if source == target:
        return values
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
