"""Storage forms of quantized linear layers in other tools, and the decoding of their values.

A form knows the tensors that a weight [out, in] consists of, by their suffix behind the layer's name (``qweight``), and computes in fp32
the values of any rows and columns of it. Pure functions of numpy arrays; must never know a file or a config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import msgspec
import numpy as np

from workers.artifacts.number_formats import Array, cast, from_fp8
from workers.layout.quant_parts import Format
from workers.layout.sharding import Span
from workers.protocol.specs import QuantName

#: Gives the stored tensor with a suffix, and its format.
Parts: TypeAlias = Callable[[str], tuple[Array, Format]]
Shape: TypeAlias = tuple[int, ...]

#: Bits of the words in which small integers are packed.
_WORD = 32
#: How a file calls the formats of scales, and of words.
_SCALES, _WORDS = ("F32", "BF16", "F16"), ("I32",)
#: Where AWQ puts the eight columns of a word: column i is nibble ``_AWQ_ORDER[i]``.
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)


class StoredForm(Protocol):
    """A form. ``words``: the form for people. ``native``: the format in which engines compute the very same values; None = they have to be
    dequantized."""

    @property
    def words(self) -> str: ...

    @property
    def native(self) -> QuantName | None: ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors of a weight."""

    def shapes(self, out: int, inputs: int) -> dict[str, tuple[Shape, ...]]:
        """The shapes that each tensor of a weight [out, inputs] may have, by its suffix. Raises ValueError for a size that the form cannot
        hold."""

    def kinds(self, suffix: str) -> tuple[str, ...]:
        """How a file calls the number formats that a tensor may have."""

    def values(self, parts: Parts, rows: Span, columns: Span) -> Array:
        """[rows, columns] fp32."""


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """``weight`` [out, in] of fp8 (e4m3) or int8, times a scale: of the whole tensor, of each output row, of each row's groups of
    ``group`` inputs, or of each ``block`` (rows, inputs). ``zero``: integers have a zero point beside each scale."""

    element: Literal["fp8", "int8"]
    scale: str = "weight_scale"
    per: Literal["tensor", "row", "group", "block"] = "row"
    group: int = 0
    block: tuple[int, int] = (128, 128)
    zero: bool = False

    @property
    def words(self) -> str:
        unit = {"tensor": "a scale a tensor", "row": "a scale a row", "group": f"groups of {self.group}"}
        return f"{self.element}, {unit.get(self.per, f'blocks of {self.block[0]} x {self.block[1]}')}"

    @property
    def native(self) -> QuantName | None:
        return self.element if self.per in ("tensor", "row") and not self.zero else None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("weight", self.scale, *(("weight_zero_point",) if self.zero else ()))

    def shapes(self, out: int, inputs: int) -> dict[str, tuple[Shape, ...]]:
        scale: tuple[Shape, ...] = ((), (1,), (1, 1))
        if self.per == "row":
            scale = ((out, 1), (out,))
        elif self.per == "group":
            scale = ((out, _whole(inputs, self.group)),)
        elif self.per == "block":
            scale = ((-(-out // self.block[0]), -(-inputs // self.block[1])),)
        found: dict[str, tuple[Shape, ...]] = {"weight": ((out, inputs),), self.scale: scale}
        return found | ({"weight_zero_point": scale} if self.zero else {})

    def kinds(self, suffix: str) -> tuple[str, ...]:
        element = ("F8_E4M3",) if self.element == "fp8" else ("I8",)
        return {"weight": element, "weight_zero_point": ("I8",)}.get(suffix, _SCALES)

    def values(self, parts: Parts, rows: Span, columns: Span) -> Array:
        elements, form = parts("weight")
        elements = elements[rows.start : rows.stop, columns.start : columns.stop]
        wide = from_fp8(elements) if form == "fp8" else elements.astype(np.float32)
        if self.zero:
            wide -= self._spread(parts("weight_zero_point"), rows, columns)
        wide *= self._spread(parts(self.scale), rows, columns)
        return wide

    def row_scales(self, parts: Parts, rows: Span) -> Array:
        """[rows] fp32: the scale of each row, where :attr:`native` says that each has one."""
        return np.ascontiguousarray(np.broadcast_to(self._spread(parts(self.scale), rows, Span(0, 1)), (rows.size, 1))[:, 0])

    def _spread(self, part: tuple[Array, Format], rows: Span, columns: Span) -> Array:
        """fp32, of a shape that multiplies [rows, columns]."""
        stored, form = part
        if self.per == "tensor":
            return _wide(stored.reshape(1, 1), form)
        height, width = {"row": (1, 0), "group": (1, self.group), "block": self.block}[self.per]
        table = stored.reshape(len(stored), -1)
        chosen = table[np.arange(rows.start, rows.stop) // height]
        return _wide(chosen if width == 0 else chosen[:, np.arange(columns.start, columns.stop) // width], form)


class PackedRows(msgspec.Struct, frozen=True, kw_only=True):
    """compressed-tensors' ``pack-quantized``: words of ``bits``-bit integers along the inputs, the first in the lowest bits, half of their
    range added; a scale for each ``group`` inputs (0 = for each row). ``zero``: zero points, packed in the same way along the rows."""

    bits: int
    group: int
    zero: bool = False

    @property
    def words(self) -> str:
        return f"{self.bits} bits, {f'groups of {self.group}' if self.group else 'a scale a row'}"

    @property
    def native(self) -> QuantName | None:
        return None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale", *(("weight_zero_point",) if self.zero else ()))

    def shapes(self, out: int, inputs: int) -> dict[str, tuple[Shape, ...]]:
        groups, each = _whole(inputs, self.group) if self.group else 1, _WORD // self.bits
        found: dict[str, tuple[Shape, ...]] = {"weight_packed": ((out, -(-inputs // each)),), "weight_scale": ((out, groups),)}
        return found | ({"weight_zero_point": ((-(-out // each), groups),)} if self.zero else {})

    def kinds(self, suffix: str) -> tuple[str, ...]:
        return _SCALES if suffix == "weight_scale" else _WORDS

    def values(self, parts: Parts, rows: Span, columns: Span) -> Array:
        half = 1 << (self.bits - 1)
        wide = _unpack(parts("weight_packed")[0][rows.start : rows.stop], self.bits, columns, axis=1) - np.float32(half)
        groups = np.arange(columns.start, columns.stop) // self.group if self.group else np.zeros(columns.size, int)
        if self.zero:
            wide -= (_unpack(parts("weight_zero_point")[0], self.bits, rows, axis=0) - np.float32(half))[:, groups]
        scales, form = parts("weight_scale")
        wide *= _wide(scales[rows.start : rows.stop], form)[:, groups]
        return wide


class Transposed(msgspec.Struct, frozen=True, kw_only=True):
    """GPTQ and AWQ: ``qweight``, ``qzeros`` and ``scales`` with the inputs as rows, a scale and a zero point for each ``group`` inputs
    (0 = all of them). GPTQ packs weights along the inputs and stores zero points less one (``zero_less_one``); ``awq`` packs weights along
    the outputs in an order of its own."""

    bits: int
    group: int
    awq: bool = False
    zero_less_one: bool = False

    @property
    def words(self) -> str:
        return f"{self.bits} bits, {f'groups of {self.group}' if self.group else 'a scale a row'}"

    @property
    def native(self) -> QuantName | None:
        return None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    def shapes(self, out: int, inputs: int) -> dict[str, tuple[Shape, ...]]:
        each = _WORD // self.bits
        groups, packed = _whole(inputs, self.group) if self.group else 1, _whole(out, each)
        words = (inputs, packed) if self.awq else (_whole(inputs, each), out)
        return {"qweight": (words,), "qzeros": ((groups, packed),), "scales": ((groups, out),)}

    def kinds(self, suffix: str) -> tuple[str, ...]:
        return _SCALES if suffix == "scales" else _WORDS

    def values(self, parts: Parts, rows: Span, columns: Span) -> Array:
        groups = np.arange(columns.start, columns.stop) // self.group if self.group else np.zeros(columns.size, int)
        words, _ = parts("qweight")
        if self.awq:
            wide = _unpack(words[columns.start : columns.stop], self.bits, rows, axis=1, order=_AWQ_ORDER)
        else:
            wide = _unpack(words[:, rows.start : rows.stop], self.bits, columns, axis=0)
        # Only the requested groups: a rank may have one of many.
        used = slice(groups[0], groups[-1] + 1)
        zeros = _unpack(parts("qzeros")[0][used], self.bits, rows, axis=1, order=_AWQ_ORDER if self.awq else None)
        scales, form = parts("scales")
        groups -= groups[0]
        if self.zero_less_one:
            # In the stored width: the zero point 0 is stored as the largest integer.
            zeros = (zeros + 1) % (1 << self.bits)
        wide -= zeros[groups]
        wide *= _wide(scales[used, rows.start : rows.stop], form)[groups]
        return np.ascontiguousarray(wide.T)


def _unpack(words: Array, bits: int, span: Span, *, axis: int, order: Array | None = None) -> Array:
    """fp32 of the integers ``span`` that ``words`` hold along ``axis``. ``order``: of the integers in a word; None = from the lowest bits
    on."""
    each = _WORD // bits
    chosen = np.arange(span.start, span.stop)
    places = chosen % each if order is None else order[chosen % each]
    found = np.take(words.view("<u4"), chosen // each, axis=axis)
    shifts = (places * bits).astype(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    return ((found >> (shifts if axis == 1 else shifts[:, None])) & mask).astype(np.float32)


def _wide(values: Array, form: Format) -> Array:
    return cast(values, form, "fp32") if form in ("fp32", "bf16", "fp16") else values.astype(np.float32)


def _whole(size: int, unit: int) -> int:
    """How often ``unit`` fits ``size``. Raises ValueError when it leaves a rest."""
    if size % unit:
        raise ValueError(f"{size} is no multiple of {unit}")
    return size // unit
