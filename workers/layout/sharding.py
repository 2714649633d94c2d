"""Which slice of every tensor a rank holds. Loader, converter, model and planner all use this module.

Pure functions of (ModelSpec, Parallel, rank). Whole tensors have their Hugging Face names, shards TensorRT-LLM's checkpoint names, in which
layer numbers begin at 0 in each stage. Must never read a file or know a number format.

Rules: query heads are dealt in whole key/value groups, to sizes that differ by at most one; where tp exceeds the number of key/value heads,
each of these is copied to several ranks, and each copy has a share of its query heads. FFN columns are dealt the same way, in whole
quantization groups where there are any. Vocabulary rows are padded to the same count on every rank (so collectives stay regular; logits of
padding are -inf). The first ``layers mod pp`` stages hold one layer more.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import ModelSpec, Parallel

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
#: The embedding's name in a shard.
VOCAB_EMBEDDING = "transformer.vocab_embedding.weight"


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

    ``layers`` of its stage; ``heads``, ``kv_heads``, ``ffn`` of its tp rank; ``kv_heads`` may overlap with those of a neighbour (a copy).
    ``vocab``: real rows; ``vocab_rows``: rows of the stored shard, equal on every rank; the rows past ``vocab`` are padding (zeros).
    ``first``, ``last``: whether the stage embeds tokens, and whether it makes logits.
    """

    rank: int
    tp_rank: int
    pp_rank: int
    first: bool
    last: bool
    layers: Span
    heads: Span
    kv_heads: Span
    ffn: Span
    vocab: Span
    vocab_rows: int


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
    """Part ``index`` of ``total`` items that are dealt in order to ``parts`` parts; sizes differ by at most one, larger parts come
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


def shard_of(model: ModelSpec, parallel: Parallel, rank: int, *, unit: int = 1) -> Shard:
    """What ``rank`` holds. FFN columns are dealt in whole groups of ``unit`` columns (:func:`workers.layout.quant_parts.unit_of`).

    Raises :class:`ConfigError` when the model cannot be split this way or there is no such rank.
    """
    parallel.check(model)
    if not 0 <= rank < parallel.world:
        raise ConfigError(f"rank {rank} is outside a world of {parallel.world}", f"tp={parallel.tp} pp={parallel.pp}")
    units = -(-model.intermediate_size // unit)
    if parallel.tp > units or parallel.tp > model.vocab_size:
        raise ConfigError(f"tp={parallel.tp} is more than the model's FFN or vocabulary can be dealt to", f"the FFN has {units} x {unit}")
    tp_rank, pp_rank = parallel.tp_rank(rank), parallel.pp_rank(rank)
    heads, kv_heads = heads_of(model, parallel.tp, tp_rank)
    rows = -(-model.vocab_size // parallel.tp)
    ffn = deal(units, parallel.tp, tp_rank).scaled(unit)
    return Shard(
        rank=rank,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        first=pp_rank == 0,
        last=pp_rank == parallel.pp - 1,
        layers=deal(model.num_layers, parallel.pp, pp_rank),
        heads=heads,
        kv_heads=kv_heads,
        ffn=Span(ffn.start, min(ffn.stop, model.intermediate_size)),
        vocab=Span(min(tp_rank * rows, model.vocab_size), min((tp_rank + 1) * rows, model.vocab_size)),
        vocab_rows=rows,
    )


def shares_embedding(model: ModelSpec, parallel: Parallel) -> bool:
    """Whether one stage uses the same weights for the embedding and the head, so that a shard has no ``lm_head.weight`` of its own."""
    return model.tied_embeddings and parallel.pp == 1


def whole_tensors(model: ModelSpec) -> dict[str, ModelTensor]:
    """Every tensor of the unsharded model by its Hugging Face name, in the order of the forward pass."""
    vocab = (model.vocab_size, model.hidden_size)
    found = [ModelTensor(name=EMBEDDING, shape=vocab)]
    for layer in range(model.num_layers):
        found += _layer_tensors(model, f"model.layers.{layer}.")
    found.append(ModelTensor(name=FINAL_NORM, shape=(model.hidden_size,)))
    if not model.tied_embeddings:
        found.append(ModelTensor(name=HEAD, shape=vocab))
    return {tensor.name: tensor for tensor in found}


def _layer_tensors(model: ModelSpec, prefix: str) -> list[ModelTensor]:
    hidden, ffn = model.hidden_size, model.intermediate_size
    rows = {"q": model.num_heads * model.head_dim, "k": model.num_kv_heads * model.head_dim, "v": model.num_kv_heads * model.head_dim}
    attention = prefix + "self_attn."
    found = [ModelTensor(name=prefix + "input_layernorm.weight", shape=(hidden,))]
    found += [ModelTensor(name=f"{attention}{x}_proj.weight", shape=(rows[x], hidden)) for x in "qkv"]
    if model.qkv_bias:
        found += [ModelTensor(name=f"{attention}{x}_proj.bias", shape=(rows[x],)) for x in "qkv"]
    if model.qk_norm:
        found += [ModelTensor(name=f"{attention}{x}_norm.weight", shape=(model.head_dim,)) for x in "qk"]
    return [
        *found,
        ModelTensor(name=attention + "o_proj.weight", shape=(hidden, rows["q"]), axis=1),
        ModelTensor(name=prefix + "post_attention_layernorm.weight", shape=(hidden,)),
        ModelTensor(name=prefix + "mlp.gate_proj.weight", shape=(ffn, hidden)),
        ModelTensor(name=prefix + "mlp.up_proj.weight", shape=(ffn, hidden)),
        ModelTensor(name=prefix + "mlp.down_proj.weight", shape=(hidden, ffn), axis=1),
    ]


def shard_tensors(model: ModelSpec, parallel: Parallel, rank: int, *, own_head: bool = False, unit: int = 1) -> tuple[ShardTensor, ...]:
    """Every tensor of ``rank`` under its TensorRT-LLM checkpoint name, in the order of the forward pass, as if nothing were quantized.

    ``own_head``: the last stage stores ``lm_head.weight`` even where it shares the embedding's rows (TensorRT-LLM wants it so).
    ``unit``: as for :func:`shard_of`.
    """
    shard = shard_of(model, parallel, rank, unit=unit)
    whole = whole_tensors(model)
    found: list[ShardTensor] = []
    if shard.first:
        found.append(_vocabulary(VOCAB_EMBEDDING, whole[EMBEDDING], shard))
    for local, layer in enumerate(range(shard.layers.start, shard.layers.stop)):
        found += _layer_shards(model, shard, whole, f"model.layers.{layer}.", f"transformer.layers.{local}.")
    if shard.last:
        found.append(_replicated("transformer.ln_f.weight", whole[FINAL_NORM]))
        if own_head or not shares_embedding(model, parallel):
            found.append(_vocabulary(HEAD, whole[EMBEDDING if model.tied_embeddings else HEAD], shard))
    return tuple(found)


def _layer_shards(model: ModelSpec, shard: Shard, whole: dict[str, ModelTensor], source: str, target: str) -> list[ShardTensor]:
    attention, to_attention = source + "self_attn.", target + "attention."
    q, kv = shard.heads.scaled(model.head_dim), shard.kv_heads.scaled(model.head_dim)

    def stacked(kind: str) -> ShardTensor:
        spans = {"q": q, "k": kv, "v": kv}
        return _stack(f"{to_attention}qkv.{kind}", *(ShardPiece(tensor=whole[f"{attention}{x}_proj.{kind}"], span=spans[x]) for x in "qkv"))

    def cut(name: str, tensor: str, span: Span) -> ShardTensor:
        return _stack(name, ShardPiece(tensor=whole[tensor], span=span))

    found = [_replicated(target + "input_layernorm.weight", whole[source + "input_layernorm.weight"]), stacked("weight")]
    if model.qkv_bias:
        found.append(stacked("bias"))
    if model.qk_norm:
        found += [_replicated(f"{to_attention}{x}_layernorm.weight", whole[f"{attention}{x}_norm.weight"]) for x in "qk"]
    return [
        *found,
        cut(to_attention + "dense.weight", attention + "o_proj.weight", q),
        _replicated(target + "post_layernorm.weight", whole[source + "post_attention_layernorm.weight"]),
        # TensorRT-LLM's names: fc is the projection under the activation (gate_proj), gate is the plain one (up_proj).
        cut(target + "mlp.fc.weight", source + "mlp.gate_proj.weight", shard.ffn),
        cut(target + "mlp.gate.weight", source + "mlp.up_proj.weight", shard.ffn),
        cut(target + "mlp.proj.weight", source + "mlp.down_proj.weight", shard.ffn),
    ]


def _stack(name: str, *pieces: ShardPiece) -> ShardTensor:
    shape = list(pieces[0].tensor.shape)
    shape[pieces[0].tensor.axis] = sum(piece.span.size for piece in pieces)
    return ShardTensor(name=name, shape=tuple(shape), pieces=pieces)


def _replicated(name: str, tensor: ModelTensor) -> ShardTensor:
    return _stack(name, ShardPiece(tensor=tensor, span=Span(0, tensor.shape[tensor.axis])))


def _vocabulary(name: str, tensor: ModelTensor, shard: Shard) -> ShardTensor:
    shape = (shard.vocab_rows, tensor.shape[1])
    return ShardTensor(name=name, shape=shape, pieces=(ShardPiece(tensor=tensor, span=shard.vocab),))


def parameters(model: ModelSpec) -> int:
    """Number of weights of the unsharded model."""
    return sum(ShardTensor(name=t.name, shape=t.shape, pieces=()).elements for t in whole_tensors(model).values())


def trtllm_refusal(model: ModelSpec, parallel: Parallel) -> tuple[str, str] | None:
    """(what, hint) when TensorRT-LLM would refuse this split of the model, though the portable engine runs it; None when it would not."""
    tp, heads, kv = parallel.tp, model.num_heads, model.num_kv_heads
    even = [n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0) and model.intermediate_size % n == 0]
    hint = f"use --tp-size {', '.join(map(str, even[:-1]))} or {even[-1]}" if len(even) > 1 else "use --tp-size 1"
    hint += ", or the portable engine"
    if kv % tp and tp % kv:
        what = f"{kv} KV heads"
    elif heads % tp:
        what = f"{heads} query heads"
    elif model.intermediate_size % tp:
        what = f"an FFN of {model.intermediate_size}"
    else:
        return None
    return f"TensorRT-LLM needs tp to divide {what}, got tp={tp}", hint
