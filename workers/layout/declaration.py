"""The tensors of a decoder's blocks: each is declared here once, with its names, its shape and its split among ranks.

Converter, loader, model, planner, quantizer, inspection and the GGUF reader all read this declaration. A whole tensor has the name that
Llama's has in Hugging Face's files; :mod:`workers.models.registry` knows where a family's files name it otherwise or join several.
Tensors with one checkpoint name are stacked there in the order of their declaration. Must never read a file or know a number format.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from workers.protocol.specs import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
#: The embedding's and the last norm's names in a checkpoint.
VOCAB_EMBEDDING = "transformer.vocab_embedding.weight"
LAST_NORM = "transformer.ln_f"
#: How the checkpoint names of the weights of norms end.
NORM_WEIGHTS = ("layernorm.weight", f"{LAST_NORM}.weight")

#: Which part of a tensor a tp rank holds: all of it, the rows or columns of its query heads, of its key/value heads, of its columns of the
#: MLP, or of its part of the vocabulary. ``first rank``: the first rank holds all, the others zeros, since the sum over ranks adds it once.
Cut: TypeAlias = Literal["whole", "heads", "kv heads", "mlp", "vocabulary", "first rank"]


class DeclaredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One whole tensor. ``name``: of Hugging Face's; ``checkpoint``: of TensorRT-LLM's; ``gguf``: of llama.cpp's; ``shape`` (out, in);
    ``axis``: the one that ranks cut. ``expert``: (its number, how many its layer has) where it is one expert's, which ranks may hold whole
    or not at all; llama.cpp's tensor then holds those of all experts, one after another. Names of a layer's tensors lack the layer's
    prefix."""

    name: str
    checkpoint: str
    gguf: str
    shape: tuple[int, ...]
    cut: Cut = "whole"
    axis: int = 0
    expert: tuple[int, int] | None = None


class Prefixes(msgspec.Struct, frozen=True, kw_only=True):
    """What stands before the names of a layer's tensors, up to the layer's number."""

    name: str = "model.layers."
    checkpoint: str = "transformer.layers."
    gguf: str = "blk."


PREFIXES = Prefixes()
#: A part of the names of the experts that routers choose.
EXPERTS = "mlp.experts."
#: Ends of the names of what chooses and weighs experts: small products that decide much.
ROUTER, SHARED_GATE = "mlp.router", "mlp.shared_expert_gate"
ROUTERS = (f".{ROUTER}.weight", f".{SHARED_GATE}.weight")


def embedding(model: ModelSpec) -> DeclaredTensor:
    return DeclaredTensor(
        name=EMBEDDING, checkpoint=VOCAB_EMBEDDING, gguf="token_embd.weight", shape=(model.vocab_size, model.hidden_size), cut="vocabulary"
    )


def final_norm(model: ModelSpec) -> tuple[DeclaredTensor, ...]:
    return _norm(model, "model.norm", "transformer.ln_f", "output_norm")


def head(model: ModelSpec) -> DeclaredTensor:
    return DeclaredTensor(name=HEAD, checkpoint=HEAD, gguf="output.weight", shape=(model.vocab_size, model.hidden_size), cut="vocabulary")


def layer_tensors(model: ModelSpec, layer: LayerSpec) -> tuple[DeclaredTensor, ...]:
    """The tensors of one layer, in the order of the forward pass."""
    before: list[DeclaredTensor] = []
    middle: list[DeclaredTensor] = []
    after: list[DeclaredTensor] = []
    if layer.post_norm:
        middle += _norm(model, "post_self_attn_layernorm", "post_self_attn_layernorm", "post_attention_norm")
        after += _norm(model, "post_mlp_layernorm", "post_mlp_layernorm", "post_ffw_norm")
    if layer.pre_norm:
        before += _norm(model, "input_layernorm", "input_layernorm", "attn_norm")
    if layer.pre_norm and not layer.parallel:
        middle += _norm(model, "post_attention_layernorm", "post_layernorm", "ffn_norm")
    return (*before, *attention_tensors(model, layer.attention), *middle, *_feed_forward(model, layer.mlp), *after)


def _norm(model: ModelSpec, name: str, checkpoint: str, gguf: str) -> tuple[DeclaredTensor, ...]:
    """A norm of the residual stream: its weight, its bias, or nothing."""
    kinds = ("weight",) * model.norm.weight + ("bias",) * model.norm.bias
    shape = (model.hidden_size,)
    return tuple(
        DeclaredTensor(name=f"{name}.{kind}", checkpoint=f"{checkpoint}.{kind}", gguf=f"{gguf}.{kind}", shape=shape) for kind in kinds
    )


def attention_tensors(model: ModelSpec, spec: AttentionSpec) -> tuple[DeclaredTensor, ...]:
    """Queries, keys and values are stacked in a checkpoint."""
    hidden, dim = model.hidden_size, model.head_dim
    rows: dict[str, int] = {"q": model.num_heads * dim, "k": model.num_kv_heads * dim, "v": model.num_kv_heads * dim}
    cuts: dict[str, Cut] = {"q": "heads", "k": "kv heads", "v": "kv heads"}

    def inner(x: str, kind: str, shape: tuple[int, ...]) -> DeclaredTensor:
        return DeclaredTensor(
            name=f"self_attn.{x}_proj.{kind}", checkpoint=f"attention.qkv.{kind}", gguf=f"attn_{x}.{kind}", shape=shape, cut=cuts[x]
        )

    found = [inner(x, "weight", (rows[x], hidden)) for x in "qkv"]
    if spec.qkv_bias:
        found += [inner(x, "bias", (rows[x],)) for x in "qkv"]
    if spec.qk_norm is not None:
        found += [
            DeclaredTensor(
                name=f"self_attn.{x}_norm.weight",
                checkpoint=f"attention.{x}_layernorm.weight",
                gguf=f"attn_{x}_norm.weight",
                shape=(dim,) if spec.qk_norm == "head" else (rows[x],),
                cut="whole" if spec.qk_norm == "head" else cuts[x],
            )
            for x in "qk"
        ]
    return (*found, *_projection("self_attn.o_proj", "attention.dense", "attn_output", (hidden, rows["q"]), "heads", spec.out_bias))


def _feed_forward(model: ModelSpec, spec: MlpSpec | MoeSpec) -> tuple[DeclaredTensor, ...]:
    return mlp_tensors(model, spec) if isinstance(spec, MlpSpec) else moe_tensors(model, spec)


def moe_tensors(model: ModelSpec, spec: MoeSpec) -> tuple[DeclaredTensor, ...]:
    """The router, the experts, and the shared expert. Experts stay apart: each is read, quantized and distributed alone."""
    hidden = model.hidden_size
    found = [_plain(ROUTER, "ffn_gate_inp", (spec.experts, hidden))]
    for number in range(spec.experts):
        found += [
            msgspec.structs.replace(each, expert=(number, spec.experts))
            for each in _gated(f"{EXPERTS}{number}", ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), hidden, spec.size)
        ]
    if spec.shared is not None:
        found += _gated("mlp.shared_expert", ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), hidden, spec.shared.size)
        if spec.shared.gated:
            found.append(_plain(SHARED_GATE, "ffn_gate_inp_shexp", (1, hidden)))
    return tuple(found)


def _plain(name: str, gguf: str, shape: tuple[int, ...]) -> DeclaredTensor:
    """A tensor that every rank has whole, which has one name in all but llama.cpp's files."""
    return DeclaredTensor(name=f"{name}.weight", checkpoint=f"{name}.weight", gguf=f"{gguf}.weight", shape=shape)


def _gated(name: str, gguf: tuple[str, str, str], hidden: int, size: int) -> tuple[DeclaredTensor, ...]:
    """The three projections of an expert, with TensorRT-LLM's names of those of a dense MLP."""
    gate, up, down = gguf
    return (
        *(
            DeclaredTensor(
                name=f"{name}.{part}.weight",
                checkpoint=f"{name}.{checkpoint}.weight",
                gguf=f"{stored}.weight",
                shape=(size, hidden),
                cut="mlp",
            )
            for part, checkpoint, stored in (("gate_proj", "fc", gate), ("up_proj", "gate", up))
        ),
        *_projection(f"{name}.down_proj", f"{name}.proj", down, (hidden, size), "mlp", bias=False),
    )


def mlp_tensors(model: ModelSpec, spec: MlpSpec) -> tuple[DeclaredTensor, ...]:
    """TensorRT-LLM calls the projection under the activation fc: gate_proj where there is one, else up_proj; and the plain one gate."""
    found: list[DeclaredTensor] = []
    gated = (("gate_proj", "fc", "ffn_gate"), ("up_proj", "gate", "ffn_up"))
    for name, checkpoint, gguf in gated if spec.gated else (("up_proj", "fc", "ffn_up"),):
        for kind, shape in (("weight", (spec.size, model.hidden_size)), ("bias", (spec.size,)))[: 1 + spec.bias]:
            found.append(
                DeclaredTensor(
                    name=f"mlp.{name}.{kind}", checkpoint=f"mlp.{checkpoint}.{kind}", gguf=f"{gguf}.{kind}", shape=shape, cut="mlp"
                )
            )
    return (*found, *_projection("mlp.down_proj", "mlp.proj", "ffn_down", (model.hidden_size, spec.size), "mlp", spec.bias))


def _projection(name: str, checkpoint: str, gguf: str, shape: tuple[int, int], cut: Cut, bias: bool) -> tuple[DeclaredTensor, ...]:
    """A product whose inputs are cut among ranks, so that ranks have to sum what it gives."""
    weight = DeclaredTensor(name=f"{name}.weight", checkpoint=f"{checkpoint}.weight", gguf=f"{gguf}.weight", shape=shape, cut=cut, axis=1)
    if not bias:
        return (weight,)
    once = DeclaredTensor(name=f"{name}.bias", checkpoint=f"{checkpoint}.bias", gguf=f"{gguf}.bias", shape=shape[:1], cut="first rank")
    return (weight, once)
