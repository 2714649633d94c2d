"""The slice of every tensor that a rank holds. Loader, converter, model and planner all use this module.

Pure functions of (ModelSpec, Parallel, rank). Whole tensors have their Hugging Face names, shards TensorRT-LLM's checkpoint names, in which
layer numbers begin at 0 in each stage. Must never read a file or know a number format.

Rules: query heads are distributed in whole key/value groups, to sizes that differ by at most one. If tp exceeds the number of key/value
heads, each of these is copied to several ranks, and each copy has a share of its query heads. FFN columns are distributed in the same way,
in whole quantization groups if there are any; with expert parallelism whole experts are distributed instead. Vocabulary rows are padded to
the same count on every rank (so collectives stay regular; logits of padding are -inf). The first ``layers mod pp`` stages hold one layer
more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from workers.layout.declaration import (
    PREFIXES,
    DeclaredTensor,
    embedding,
    final_norm,
    head,
    layer_tensors,
)
from workers.protocol.errors import ConfigError
from workers.protocol.specs import MlpSpec, ModelSpec, MoeSpec, Parallel

#: (whole tensor's number of the layer, None outside layers; the tensor).
_Placed: TypeAlias = tuple[int | None, DeclaredTensor]


class Span(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Half-open range of global indices."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """The same range in units that are ``factor`` times smaller (heads to rows)."""
        return Span(self.start * factor, self.stop * factor)


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank holds, in global indices.

    ``layers`` of its stage; ``heads``, ``kv_heads`` of its tp rank; ``kv_heads`` may overlap with those of a neighbour (a copy).
    ``unit``: columns of an MLP that stay together. ``expert_parallel``: experts are distributed whole, not each expert's columns.
    ``vocab``: real rows; ``vocab_rows``: rows of the stored shard, equal on every rank; the rows past ``vocab`` are padding (zeros).
    ``first``, ``last``: whether the stage embeds tokens, and whether it makes logits.
    """

    rank: int
    tp: int
    tp_rank: int
    pp_rank: int
    first: bool
    last: bool
    layers: Span
    heads: Span
    kv_heads: Span
    unit: int
    vocab: Span
    vocab_rows: int
    expert_parallel: bool = False

    def columns(self, size: int) -> Span:
        """This rank's columns of an MLP of ``size`` columns, distributed in whole units."""
        span = deal(-(-size // self.unit), self.tp, self.tp_rank).scaled(self.unit)
        return Span(span.start, min(span.stop, size))

    def experts(self, count: int) -> Span:
        """Those of ``count`` experts of which this rank holds anything."""
        return deal(count, self.tp, self.tp_rank) if self.expert_parallel else Span(0, count)

    def expert_columns(self, size: int) -> Span:
        """This rank's columns of each of its experts of ``size`` columns."""
        return Span(0, size) if self.expert_parallel else self.columns(size)


class ModelTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A whole tensor of the unsharded model: Hugging Face name, shape (out, in), and the axis that ranks cut."""

    name: str
    shape: tuple[int, ...]
    axis: int = 0


class ShardPiece(msgspec.Struct, frozen=True, kw_only=True):
    """``span`` of a whole tensor along its own axis."""

    tensor: ModelTensor
    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        shape[self.tensor.axis] = self.span.size
        return tuple(shape)


class ShardTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as a rank stores it: ``pieces`` one after another along their axis; the rest of ``shape`` is zero padding."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[ShardPiece, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def places(self) -> Iterator[tuple[ShardPiece, Span]]:
        """Each piece with the range that it takes along its axis in the stored tensor."""
        start = 0
        for piece in self.pieces:
            yield piece, Span(start, start + piece.span.size)
            start += piece.span.size


def deal(total: int, parts: int, index: int) -> Span:
    """Part ``index`` of ``total`` items that are distributed in order to ``parts`` parts; sizes differ by at most one, larger parts come
    first."""
    each, extra = divmod(total, parts)
    start = index * each + min(index, extra)
    return Span(start, start + each + (index < extra))


def heads_of(model: ModelSpec, tp: int, tp_rank: int) -> tuple[Span, Span]:
    """(query heads, key/value heads) of a tp rank. Every query head is on a rank that has its key/value head."""
    group = model.num_heads // model.num_kv_heads
    if tp <= model.num_kv_heads:
        kv = deal(model.num_kv_heads, tp, tp_rank)
        return kv.scaled(group), kv
    # More ranks than key/value heads: deal the ranks to the heads, then each head's queries to its ranks.
    head, sharers = next(
        (head, ranks) for head in range(model.num_kv_heads) if (ranks := deal(tp, model.num_kv_heads, head)).start <= tp_rank < ranks.stop
    )
    share = deal(group, sharers.size, tp_rank - sharers.start)
    return Span(head * group + share.start, head * group + share.stop), Span(head, head + 1)


def kv_copies(model: ModelSpec, shard: Shard) -> int:
    """How many ranks hold the key/value heads of this one."""
    return sum(heads_of(model, shard.tp, other)[1].start == shard.kv_heads.start for other in range(shard.tp))


def shard_of(model: ModelSpec, parallel: Parallel, rank: int, *, unit: int = 1) -> Shard:
    """What ``rank`` holds. FFN columns are distributed in whole groups of ``unit`` columns (:func:`workers.layout.quant_parts.unit_of`).

    Raises :class:`ConfigError` when the model cannot be split this way or there is no such rank.
    """
    parallel.check(model)
    if not 0 <= rank < parallel.world:
        raise ConfigError(f"rank {rank} is outside a world of {parallel.world}", f"tp={parallel.tp} pp={parallel.pp}")
    cut = [kind.mlp.size for kind in model.kinds if isinstance(kind.mlp, MlpSpec) or not parallel.expert_parallel]
    cut += [moe.shared.size for moe in model.moes if moe.shared is not None]
    units = -(-min(cut, default=parallel.tp * unit) // unit)
    if parallel.tp > units or parallel.tp > model.vocab_size:
        raise ConfigError(
            f"tp={parallel.tp} is more than the model's FFN or vocabulary can be distributed to", f"the FFN has {units} x {unit}"
        )
    tp_rank, pp_rank = parallel.tp_rank(rank), parallel.pp_rank(rank)
    heads, kv_heads = heads_of(model, parallel.tp, tp_rank)
    rows = -(-model.vocab_size // parallel.tp)
    return Shard(
        rank=rank,
        tp=parallel.tp,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        first=pp_rank == 0,
        last=pp_rank == parallel.pp - 1,
        layers=deal(model.num_layers, parallel.pp, pp_rank),
        heads=heads,
        kv_heads=kv_heads,
        unit=unit,
        vocab=Span(min(tp_rank * rows, model.vocab_size), min((tp_rank + 1) * rows, model.vocab_size)),
        vocab_rows=rows,
        expert_parallel=parallel.expert_parallel,
    )


def shares_embedding(model: ModelSpec, parallel: Parallel) -> bool:
    """Whether one stage uses the same weights for the embedding and the head, so that a shard has no ``lm_head.weight`` of its own."""
    return model.tied_embeddings and parallel.pp == 1


def whole_tensors(model: ModelSpec) -> dict[str, ModelTensor]:
    """Every tensor of the unsharded model by its name, in the order of the forward pass."""
    found = [_whole(None, embedding(model))]
    for layer in range(model.num_layers):
        found += [_whole(layer, tensor) for tensor in layer_tensors(model, model.layer(layer))]
    found += [_whole(None, tensor) for tensor in final_norm(model)]
    if not model.tied_embeddings:
        found.append(_whole(None, head(model)))
    return {tensor.name: tensor for tensor in found}


def gguf_names(model: ModelSpec) -> dict[str, str]:
    """llama.cpp's name of every whole tensor, by the tensor's own name."""
    found = {each.name: each.gguf for each in (embedding(model), *final_norm(model), head(model))}
    for layer in range(model.num_layers):
        tensors = layer_tensors(model, model.layer(layer))
        found |= {f"{PREFIXES.name}{layer}.{each.name}": f"{PREFIXES.gguf}{layer}.{each.gguf}" for each in tensors}
    return found


def _whole(layer: int | None, tensor: DeclaredTensor) -> ModelTensor:
    prefix = "" if layer is None else f"{PREFIXES.name}{layer}."
    return ModelTensor(name=prefix + tensor.name, shape=tensor.shape, axis=tensor.axis)


def shard_tensors(model: ModelSpec, parallel: Parallel, rank: int, *, own_head: bool = False, unit: int = 1) -> tuple[ShardTensor, ...]:
    """Every tensor of ``rank`` under its TensorRT-LLM checkpoint name, in the order of the forward pass, as if nothing were quantized.

    ``own_head``: the last stage stores ``lm_head.weight`` even where it shares the embedding's rows (TensorRT-LLM wants it so).
    ``unit``: as for :func:`shard_of`.
    """
    return tensors_of(model, parallel, shard_of(model, parallel, rank, unit=unit), own_head=own_head)


def tensors_of(model: ModelSpec, parallel: Parallel, shard: Shard, *, own_head: bool = False) -> tuple[ShardTensor, ...]:
    """:func:`shard_tensors` of a rank whose ``shard`` is known."""
    found: list[ShardTensor] = []
    if shard.first:
        found.append(_stack(model, shard, embedding(model).checkpoint, [(None, embedding(model))]))
    for local, layer in enumerate(range(shard.layers.start, shard.layers.stop)):
        stacks: dict[str, list[_Placed]] = {}
        for tensor in layer_tensors(model, model.layer(layer)):
            if tensor.expert is not None and not _holds(shard, *tensor.expert):
                continue
            stacks.setdefault(f"{PREFIXES.checkpoint}{local}.{tensor.checkpoint}", []).append((layer, tensor))
        found += [_stack(model, shard, name, stack) for name, stack in stacks.items()]
    if shard.last:
        found += [_stack(model, shard, tensor.checkpoint, [(None, tensor)]) for tensor in final_norm(model)]
        if own_head or not shares_embedding(model, parallel):
            found.append(_stack(model, shard, head(model).checkpoint, [(None, embedding(model) if model.tied_embeddings else head(model))]))
    return tuple(found)


def _stack(model: ModelSpec, shard: Shard, name: str, stack: list[_Placed]) -> ShardTensor:
    pieces = tuple(ShardPiece(tensor=_whole(layer, tensor), span=_span(model, shard, tensor)) for layer, tensor in stack)
    shape, axis = list(stack[0][1].shape), stack[0][1].axis
    if stack[0][1].cut == "vocabulary":
        shape[axis] = shard.vocab_rows
    elif stack[0][1].cut != "first rank":
        shape[axis] = sum(piece.span.size for piece in pieces)
    return ShardTensor(name=name, shape=tuple(shape), pieces=pieces)


def _holds(shard: Shard, expert: int, count: int) -> bool:
    held = shard.experts(count)
    return held.start <= expert < held.stop


def _span(model: ModelSpec, shard: Shard, tensor: DeclaredTensor) -> Span:
    """What the rank holds of a tensor, along the tensor's axis."""
    size = tensor.shape[tensor.axis]
    if tensor.expert is not None and shard.expert_parallel:
        return Span(0, size)
    match tensor.cut:
        case "whole":
            return Span(0, size)
        case "heads":
            return shard.heads.scaled(model.head_dim)
        case "kv heads":
            return shard.kv_heads.scaled(model.head_dim)
        case "mlp":
            return shard.columns(size)
        case "vocabulary":
            return shard.vocab
        case "first rank":
            return Span(0, size if shard.tp_rank == 0 else 0)


def parameters(model: ModelSpec) -> int:
    """Number of weights of the unsharded model."""
    return sum(math.prod(tensor.shape) for tensor in whole_tensors(model).values())


def active_parameters(model: ModelSpec) -> int:
    """Number of weights that compute one token: of a mixture's experts, those that a token takes."""
    unused = 0
    for layer in range(model.num_layers):
        if isinstance(moe := model.layer(layer).mlp, MoeSpec):
            unused += (moe.experts - moe.experts_per_token) * 3 * moe.size * model.hidden_size
    return parameters(model) - unused


def trtllm_refusal(model: ModelSpec, parallel: Parallel) -> tuple[str, str] | None:
    """(what, hint) when TensorRT-LLM would refuse this split of the model, though the portable engine runs it; None when it would not."""
    tp, heads, kv = parallel.tp, model.num_heads, model.num_kv_heads
    even = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (kv % n == 0 or n % kv == 0) and all(kind.mlp.size % n == 0 for kind in model.kinds)
    ]
    hint = f"use --tp-size {', '.join(map(str, even[:-1]))} or {even[-1]}" if len(even) > 1 else "use --tp-size 1"
    hint += ", or the portable engine"
    if kv % tp and tp % kv:
        what = f"{kv} KV heads"
    elif heads % tp:
        what = f"{heads} query heads"
    elif ffn := next((kind.mlp.size for kind in model.kinds if kind.mlp.size % tp), 0):
        what = f"an FFN of {ffn}"
    else:
        return None
    return f"TensorRT-LLM needs tp to divide {what}, got tp={tp}", hint
