"""Quantization: a Source of integers and scales, computed from a Source of unquantized weights one slice at a time.

Owns the arithmetic: symmetric int8 and e4m3 with one scale an output row, 4-bit integers with a scale and an offset for each group of
inputs. Values do not depend on the requested slice, so a rank's parts are bitwise slices of the unsharded model's parts. Holds no more than
one slice and its scales. Rounds to nearest; there is no calibration data.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workers.artifacts.number_formats import FP8_MAX, STORAGE, Array, cast, to_fp8
from workers.artifacts.source import CHUNK, Block, Source
from workers.layout.quant_parts import Part, cut_part, part_of, parts_of, whole_parts
from workers.layout.sharding import ModelTensor, Span
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import ModelSpec, Quant, QuantName


class QuantizedSource:
    """The quantized parts of a model whose weights ``source`` has unquantized. Tensors that stay unquantized pass through."""

    def __init__(self, source: Source, model: ModelSpec, quant: Quant) -> None:
        if quant.weights is None:
            raise ValueError(f"{quant} is no quantization of weights")
        self._source = source
        self._form = _FORMS[quant.weights]
        self._group = quant.group_size or 0
        self._plan = parts_of(quant, "fp32")
        self._parts = whole_parts(model, quant, "fp32")
        #: Parts that were made together with one that was read and are not read yet: at most the scales of one layer's tensor.
        self._made: dict[tuple[str, Span], Block] = {}

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        """``span`` of a part or of an unquantized tensor. Raises :class:`ArtifactError` for weights that are not finite."""
        if tensor.name not in self._parts:
            return self._source.read(tensor, span)
        key = (tensor.name, span)
        if key not in self._made:
            whole, part = self._parts[tensor.name]
            covered = Span(0, whole.shape[1]) if part.columns == 0 and whole.axis == 1 else _uncut(span, whole, part)
            self._made |= self._quantize(whole, covered)
        return self._made.pop(key)

    def release(self) -> None:
        self._source.release()

    def _quantize(self, whole: ModelTensor, span: Span) -> dict[tuple[str, Span], Block]:
        """All parts of ``span`` of ``whole`` along its axis, by their names and spans."""
        # The scale of a row covers all its inputs, even if a rank has only some of them.
        full = self._group == 0 and whole.axis == 1
        read = self._source.read(whole, Span(0, whole.shape[1]) if full else span)
        columns = slice(span.start, span.stop) if full else slice(None)
        rows = len(read.values)
        width = span.size if whole.axis == 1 else whole.shape[1]
        results = [np.empty(part.shape(rows, width), STORAGE[part.format]) for part in self._plan]
        step = max(1, CHUNK // whole.shape[1])
        for start in range(0, rows, step):
            wide = cast(read.values[start : start + step], read.format, "fp32")
            if not np.isfinite(wide).all():
                raise ArtifactError(f"{whole.name} holds NaN or infinity", "no scale covers it", "check the model's files")
            for result, values in zip(results, self._form(wide, columns, self._group), strict=True):
                result[start : start + step] = values
        return {
            (part_of(whole, part).name, cut_part(span, whole, part)): Block(result, part.format)
            for part, result in zip(self._plan, results, strict=True)
        }


def _uncut(span: Span, whole: ModelTensor, part: Part) -> Span:
    """The inverse of :func:`workers.layout.quant_parts.cut_part`."""
    return span.scaled(part.columns) if whole.axis == 1 else span


def _row_scale(wide: Array, top: float) -> Array:
    """[rows] fp32: the scale of each row, so that its largest magnitude becomes ``top``."""
    return _step(np.abs(wide).max(axis=1) / np.float32(top))


def _step(size: Array) -> Array:
    """``size`` as a divisor: 1 where it is zero or denormal, so that such weights become zeros."""
    return np.where(size < np.finfo(np.float32).tiny, np.float32(1), size)


def _int8(wide: Array, columns: slice, group: int) -> tuple[Array, ...]:
    scale = _row_scale(wide, 127)
    return np.rint(wide[:, columns] / scale[:, None]).clip(-127, 127).astype(np.int8), scale


def _fp8(wide: Array, columns: slice, group: int) -> tuple[Array, ...]:
    scale = _row_scale(wide, FP8_MAX)
    return to_fp8((wide[:, columns] / scale[:, None]).clip(-FP8_MAX, FP8_MAX)), scale


def _int4(wide: Array, columns: slice, group: int) -> tuple[Array, ...]:
    """The range of a group always includes zero, so that its offset is at most eight steps and is rounded as finely as its scale."""
    grouped = wide.reshape(len(wide), -1, group)
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    scale = cast(_step((high - low) / np.float32(15)), "fp32", "bf16")
    step = cast(scale, "bf16", "fp32")
    zero = cast(low + 8 * step, "fp32", "bf16")
    offset = cast(zero, "bf16", "fp32")
    nibbles = (np.rint((grouped - offset[:, :, None]) / step[:, :, None]).clip(-8, 7) + 8).astype(np.uint8)
    packed = nibbles[:, :, : group // 2] | nibbles[:, :, group // 2 :] << 4
    return packed.reshape(len(wide), -1), scale, zero


_FORMS: dict[QuantName, Callable[[Array, slice, int], tuple[Array, ...]]] = {"int8": _int8, "int4": _int4, "fp8": _fp8}
