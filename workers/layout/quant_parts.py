"""Storage of tensors: unquantized, or as quantized parts (integers, scales, offsets), each split among ranks like its tensor.

Pure functions over :mod:`workers.layout.sharding`. Converter, loader, checkpoint reader, inspection and model all read names, formats and
shapes of parts here. Parts have TensorRT-LLM's names. Must never compute a value.

A part of a whole tensor is a tensor itself: ``...q_proj.weight`` has ``...q_proj.per_channel_scale`` beside it, with an axis of its own. So
code that cuts and joins whole tensors does the same with parts, and no scale or group is ever cut between two ranks.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from workers.layout.declaration import PREFIXES, ROUTERS
from workers.layout.sharding import ModelTensor, ShardPiece, ShardTensor, Span, shard_tensors, whole_tensors
from workers.protocol.errors import ConfigError
from workers.protocol.specs import DType, ModelSpec, Parallel, Quant

#: How one element lies in a file. ``uint8`` holds two 4-bit integers; ``fp8`` is e4m3 without infinities; ``int32`` are words in which
#: other tools pack smaller integers.
Format = Literal["fp32", "bf16", "fp16", "int8", "uint8", "fp8", "int32"]
FORMAT_BYTES: dict[Format, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "uint8": 1, "fp8": 1, "int32": 4}

#: The FP8 matrix instructions take inner dimensions that are multiples of this.
FP8_UNIT = 16


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a linear layer's weight [out, in]. ``columns``: how many inputs one column of the part covers; 0 = one value for each
    output row."""

    suffix: str
    format: Format
    columns: int = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the part of a weight [out_features, in_features]."""
        return (out_features, in_features // self.columns) if self.columns else (out_features,)


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor in a rank's file, and its format."""

    tensor: ShardTensor
    format: Format

    @property
    def nbytes(self) -> int:
        return FORMAT_BYTES[self.format] * self.tensor.elements


def parts_of(quant: Quant, dtype: DType) -> tuple[Part, ...]:
    """The parts of every linear layer's weight, ``weight`` first. ``dtype``: the format of plain weights.

    int8, fp8: w = weight * scale of its row. int4: w = scale * (nibble - 8) + zero, a scale and a zero for each ``group_size`` inputs; in
    each group's bytes the first half of its inputs are the low nibbles, the second half the high ones.
    """
    form, group = quant.weights, quant.group_size
    if form == "int4" and group is not None:
        groups = (Part(suffix=suffix, format="bf16", columns=group) for suffix in ("weights_scaling_factor", "zero"))
        return (Part(suffix="weight", format="uint8", columns=2), *groups)
    if form == "int8" or form == "fp8":
        return (Part(suffix="weight", format=form), Part(suffix="per_channel_scale", format="fp32", columns=0))
    return (Part(suffix="weight", format=dtype),)


def unit_of(quant: Quant) -> int:
    """How many inputs of the down projection must stay together on one rank."""
    return {"int4": quant.group_size or 1, "fp8": FP8_UNIT}.get(quant.weights or "", 1)


def quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the formats of :class:`~workers.protocol.specs.Quant` apply to a whole or stored tensor: to linear layers, those of experts
    included, not to the embedding, the head, or what chooses and weighs experts."""
    return name.startswith((PREFIXES.name, PREFIXES.checkpoint)) and len(shape) == 2 and not name.endswith(ROUTERS)


def part_of(tensor: ModelTensor, part: Part) -> ModelTensor:
    """``part`` of the whole ``tensor``, as a whole tensor. Raises :class:`ConfigError` where its rows are no whole number of groups."""
    out_features, in_features = tensor.shape
    if part.columns and in_features % part.columns:
        raise ConfigError(
            f"{tensor.name} has {in_features} inputs, not a multiple of {part.columns}",
            "every scale belongs to a whole group of inputs",
            "choose a smaller group size, or int8",
        )
    name = f"{tensor.name.removesuffix('weight')}{part.suffix}"
    return ModelTensor(name=name, shape=part.shape(out_features, in_features), axis=tensor.axis if part.columns else 0)


def whole_parts(model: ModelSpec, quant: Quant, dtype: DType) -> dict[str, tuple[ModelTensor, Part]]:
    """Every part of the unsharded model's linear layers by its name: (its whole tensor, part); empty when nothing is quantized."""
    if quant.weights is None:
        return {}
    linears = [tensor for tensor in whole_tensors(model).values() if quantized(tensor.name, tensor.shape)]
    return {part_of(tensor, part).name: (tensor, part) for tensor in linears for part in parts_of(quant, dtype)}


def cut_part(span: Span, tensor: ModelTensor, part: Part) -> Span:
    """The span of ``part`` that belongs to ``span`` of the whole ``tensor``. Raises :class:`ConfigError` when it cuts a group in two."""
    if tensor.axis == 0:
        return span
    if not part.columns:
        return Span(0, tensor.shape[0])
    if span.start % part.columns or span.stop % part.columns:
        raise ConfigError(
            f"inputs {span.start}..{span.stop} of {tensor.name} are no whole groups of {part.columns}",
            "a rank's share of the heads ends inside a group",
            "choose another tp size, a smaller group size, or int8",
        )
    return Span(span.start // part.columns, span.stop // part.columns)


def stored_tensors(
    model: ModelSpec, parallel: Parallel, rank: int, *, dtype: DType, quant: Quant, own_head: bool = False
) -> tuple[StoredTensor, ...]:
    """Everything that the file of ``rank`` holds, in the order of the forward pass; arguments as for :func:`shard_tensors`.

    Raises :class:`ConfigError` when the model cannot be split this way, or a group would be cut between two ranks.
    """
    found: list[StoredTensor] = []
    parts = parts_of(quant, dtype)
    for tensor in shard_tensors(model, parallel, rank, own_head=own_head, unit=unit_of(quant)):
        if quant.weights is None or not quantized(tensor.name, tensor.shape):
            found.append(StoredTensor(tensor=tensor, format=dtype))
        else:
            found += [StoredTensor(tensor=_stored_part(tensor, part), format=part.format) for part in parts]
    return tuple(found)


def _stored_part(tensor: ShardTensor, part: Part) -> ShardTensor:
    pieces = tuple(ShardPiece(tensor=part_of(p.tensor, part), span=cut_part(p.span, p.tensor, part)) for p in tensor.pieces)
    out_features, in_features = tensor.shape
    return ShardTensor(
        name=f"{tensor.name.removesuffix('weight')}{part.suffix}", shape=part.shape(out_features, in_features), pieces=pieces
    )
