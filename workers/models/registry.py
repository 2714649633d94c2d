"""The supported model families, in one table. A new family is one file in :mod:`workers.models.families` and one line here."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import NamedTuple

from msgspec.structs import replace

from workers.layout.declaration import PREFIXES
from workers.layout.sharding import gguf_names, whole_tensors
from workers.models.families import (
    arcee,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    granitemoe,
    helium,
    llama,
    ministral,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from workers.models.families.family import Family, FileTensor
from workers.protocol.specs import DivisorScaling, LongRopeScaling, ModelSpec, MoeSpec, YarnScaling, model_spec, uniform_decoder

#: By ``model_type``.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        granite.FAMILY,
        smollm3.FAMILY,
        olmo2.FAMILY,
        phi3.FAMILY,
        ministral.FAMILY,
        gemma.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        glm.FAMILY,
        glm4.FAMILY,
        cohere.FAMILY,
        cohere2.FAMILY,
        olmo.FAMILY,
        olmo3.FAMILY,
        starcoder2.FAMILY,
        stablelm.FAMILY,
        seed_oss.FAMILY,
        exaone4.FAMILY,
        ernie4_5.FAMILY,
        arcee.FAMILY,
        nemotron.FAMILY,
        helium.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        qwen2_moe.FAMILY,
        olmoe.FAMILY,
        granitemoe.FAMILY,
        granitemoe.SHARED_FAMILY,
    )
}


def gguf_families() -> dict[str, Family]:
    """The families whose GGUFs are read, by llama.cpp's name of the architecture."""
    return {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}


def trtllm_families() -> dict[str, Family]:
    """The families that TensorRT-LLM's checkpoint format names, by ``model_type``."""
    return {family.model_type: family for family in FAMILIES.values() if family.trtllm is not None}


def trtllm_gap(model: ModelSpec) -> str:
    """The facts of the model for which TensorRT-LLM's checkpoint format has no key; empty if there are none."""
    family, attention = model.architecture, model.kinds[0].attention
    if model.moes:
        return "mixtures of experts are not written in that format here"
    if family not in trtllm_families():
        return f"the format does not name the family {family!r}"
    if any(isinstance(rope.scaling, YarnScaling | LongRopeScaling | DivisorScaling) for rope in model.ropes):
        return "the format's keys for a scaling by YaRN, LongRoPE or stored divisors are not written here"
    plain = uniform_decoder(
        num_layers=model.num_layers,
        intermediate_size=model.widest_mlp,
        rope_theta=attention.rope.theta if attention.rope is not None else 1.0,
        rope_scaling=attention.rope.scaling if attention.rope is not None else None,
        qkv_bias=family == "qwen2",
        qk_norm="head" if family == "qwen3" else None,
        **{name: getattr(model, name) for name in _SHAPE},
    )
    return "" if model == plain else "it has biases, windows, norms or scales for which this architecture has no key in the format"


#: What the format says of a model beside its layers.
_SHAPE = (
    "architecture", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_position", "rms_norm_eps", "tied_embeddings",
)  # fmt: skip


def trtllm_model(model: ModelSpec) -> ModelSpec:
    """``model`` as TensorRT-LLM's checkpoints describe it: they have no key for a sliding window, and up to its length a model that slides
    is exactly one that attends to all."""
    windows = [window for window in model.windows if window is not None]
    if not windows:
        return model
    layers = [model.layer(index) for index in range(model.num_layers)]
    full = [replace(layer, attention=layer.attention.sliding(None)) for layer in layers]
    facts = {name: getattr(model, name) for name in model.__struct_fields__ if name not in ("kinds", "layers", "max_position")}
    return model_spec(full, max_position=min(model.max_position, *windows), **facts)


class FilePlace(NamedTuple):
    """Where a file holds a whole tensor: ``name`` of the tensor there, the ``first`` of its rows, its whole ``shape``, whose last
    axis are inputs and all others together rows."""

    name: str
    first: int
    shape: tuple[int, ...]


def file_places(model: ModelSpec, *, packed: bool = False) -> dict[str, FilePlace]:
    """Where Hugging Face's files hold each whole tensor, by the tensor's own name. ``packed``: with the experts of a layer in one tensor,
    as :func:`is_packed` tells."""
    family = FAMILIES[model.architecture]
    return _places(model, family.packed if packed else family.tensors, {name: name for name in whole_tensors(model)})


def gguf_places(model: ModelSpec) -> dict[str, FilePlace]:
    """Where a GGUF holds each whole tensor, by the tensor's own name."""
    form = FAMILIES[model.architecture].gguf
    return _places(model, () if form is None else form.tensors, gguf_names(model))


def _places(model: ModelSpec, tensors: tuple[FileTensor, ...], names: dict[str, str]) -> dict[str, FilePlace]:
    """``names``: of the whole tensors in the files, if it were not for ``tensors``."""
    held = {stem: file for file in tensors for stem in file.holds}
    whole = whole_tensors(model)
    sizes = {names[name]: tensor.shape[0] for name, tensor in whole.items()}
    found: dict[str, FilePlace] = {}
    for name, tensor in whole.items():
        prefix, stem, kind = _parts(names[name])
        expert = _EXPERT.fullmatch(stem)
        number = expert[1] if expert else ""
        stem = _EXPERT.sub(r"mlp.experts.*.\2", stem)
        if (file := held.get(stem)) is None:
            found[name] = FilePlace(names[name], 0, tensor.shape)
            continue
        rows = [sizes[f"{prefix}{each.replace('*', number)}.{kind}"] for each in file.holds]
        first, shape = sum(rows[: file.holds.index(stem)]), (sum(rows), *tensor.shape[1:])
        if expert and "*" not in file.stem:
            moe = model.layer(_layer(prefix)).mlp
            assert isinstance(moe, MoeSpec)
            first, shape = first + int(number) * shape[0], (moe.experts, *shape)
        found[name] = FilePlace(f"{prefix}{file.stem.replace('*', number)}{'' if file.bare else f'.{kind}'}", first, shape)
    return found


def is_packed(model: ModelSpec, names: Container[str]) -> bool:
    """Whether a folder with tensors of these ``names`` has the experts of each layer in one tensor."""
    layer = next((index for index in range(model.num_layers) if isinstance(model.layer(index).mlp, MoeSpec)), None)
    packed = [file for file in FAMILIES[model.architecture].packed if file.bare]
    return layer is not None and any(f"{PREFIXES.name}{layer}.{file.stem}" in names for file in packed)


#: A projection of an expert: its number, and which projection.
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")


def rotated_rows(model: ModelSpec) -> dict[str, int]:
    """How many components of each head are rotated, by the name of each whole tensor whose rows are heads of queries or keys. In layers
    that do not rotate, files have the order of the others."""
    found: dict[str, int] = {}
    for name in whole_tensors(model):
        prefix, stem, _ = _parts(name)
        if stem in _ROTATED:
            rope = model.layer(_layer(prefix)).attention.rope
            found[name] = (rope or model.ropes[0]).dim
    return found


_ROTATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")


def _layer(prefix: str) -> int:
    """The number in ``model.layers.3.``."""
    return int(prefix.removeprefix(PREFIXES.name)[:-1])


def _parts(name: str) -> tuple[str, str, str]:
    """(prefix, stem, kind) of a tensor's name in Hugging Face's files or a GGUF: ``model.layers.3.``, ``self_attn.q_proj``, ``weight``."""
    stem, kind = name.rsplit(".", 1)
    layers = next((each for each in (PREFIXES.name, PREFIXES.gguf) if stem.startswith(each)), None)
    if layers is None:
        return "", stem, kind
    number, inner = stem.removeprefix(layers).split(".", 1)
    return f"{layers}{number}.", inner, kind
