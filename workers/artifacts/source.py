"""The Source protocol: slices of whole tensors (or their parts) by name; and the assembly of a rank's tensor from them.

Owns the ``Source`` protocol and ``assemble``. Must never know a file format or import torch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from workers.artifacts.number_formats import STORAGE, Array, cast
from workers.layout.quant_parts import Format
from workers.layout.sharding import ModelTensor, ShardTensor, Span

#: Elements that are converted at a time: bounds the temporaries of a cast to a few MB.
CHUNK = 1 << 20


class Block(NamedTuple):
    """Values of a slice, in storage type ``STORAGE[format]``; possibly a view of a mapped file."""

    values: Array
    format: Format


class Source(Protocol):
    """Weights of one unsharded model, in any kind of file."""

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        """``span`` of ``tensor`` along the tensor's own axis. Raises :class:`~workers.protocol.errors.ArtifactError`."""

    def release(self) -> None:
        """Call when the results of :meth:`read` are no longer used: their memory may be released."""


def assemble(source: Source, wanted: ShardTensor, form: Format) -> Array:
    """The tensor that a rank stores, in ``STORAGE[form]``; rows that no piece covers are zero."""
    result = np.zeros(wanted.shape, STORAGE[form])
    for piece, place in wanted.places():
        if not piece.span.size:
            continue
        block = source.read(piece.tensor, piece.span)
        target = result[place.start : place.stop] if piece.tensor.axis == 0 else result[:, place.start : place.stop]
        convert_into(target, block, form)
        del block
        source.release()
    return result


def convert_into(target: Array, block: Block, form: Format) -> None:
    """Copy ``block`` into ``target`` of the same shape, in format ``form``, some rows at a time."""
    rows = max(1, CHUNK // max(1, block.values[0].size))
    for start in range(0, len(block.values), rows):
        target[start : start + rows] = cast(block.values[start : start + rows], block.format, form)


def cut(values: Array, tensor: ModelTensor, span: Span) -> Array:
    """View of ``span`` of a whole tensor along its axis."""
    return values[span.start : span.stop] if tensor.axis == 0 else values[:, span.start : span.stop]


def rotary_halves(values: Array, head_dim: int, rotated: int) -> Array:
    """``values``, whose rows are whole heads, with the first ``rotated`` rows of each brought from interleaved rotary order (pairs side by
    side) to halves (component i paired with i + rotated / 2)."""
    heads = values.reshape(-1, head_dim, *values.shape[1:])
    paired = heads[:, :rotated].reshape(len(heads), rotated // 2, 2, *values.shape[1:])
    halves = paired.swapaxes(1, 2).reshape(len(heads), rotated, *values.shape[1:])
    return np.concatenate((halves, heads[:, rotated:]), axis=1).reshape(values.shape)
