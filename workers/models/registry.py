"""The supported model families, in one table. A new family is one file in :mod:`workers.models.families` and one line here."""

from __future__ import annotations

from msgspec.structs import replace

from workers.layout.declaration import PREFIXES
from workers.layout.sharding import ModelTensor, gguf_names, whole_tensors
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
    helium,
    llama,
    ministral,
    mistral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from workers.models.families.family import Family, FileTensor
from workers.protocol.specs import DivisorScaling, LongRopeScaling, ModelSpec, YarnScaling, model_spec, uniform_decoder

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


def file_places(model: ModelSpec) -> dict[str, tuple[str, int]]:
    """Where Hugging Face's files hold each whole tensor: (name there, first row), by the tensor's own name."""
    whole = whole_tensors(model)
    return _places(FAMILIES[model.architecture].tensors, {name: name for name in whole}, whole)


def gguf_places(model: ModelSpec) -> dict[str, tuple[str, int]]:
    """Where a GGUF holds each whole tensor: (name there, first row), by the tensor's own name."""
    form, whole, names = FAMILIES[model.architecture].gguf, whole_tensors(model), gguf_names(model)
    return _places(() if form is None else form.tensors, {name: names[name] for name in whole}, whole)


def _places(tensors: tuple[FileTensor, ...], names: dict[str, str], whole: dict[str, ModelTensor]) -> dict[str, tuple[str, int]]:
    """``names``: of the whole tensors in the files, if it were not for ``tensors``."""
    held = {stem: file for file in tensors for stem in file.holds}
    rows = {names[name]: tensor.shape[0] for name, tensor in whole.items()}
    found: dict[str, tuple[str, int]] = {}
    for name in whole:
        prefix, stem, kind = _parts(names[name])
        if stem not in held:
            found[name] = (names[name], 0)
            continue
        before = held[stem].holds[: held[stem].holds.index(stem)]
        found[name] = (f"{prefix}{held[stem].stem}.{kind}", sum(rows[f"{prefix}{each}.{kind}"] for each in before))
    return found


def rotated_rows(model: ModelSpec) -> dict[str, int]:
    """How many components of each head are rotated, by the name of each whole tensor whose rows are heads of queries or keys. In layers
    that do not rotate, files have the order of the others."""
    found: dict[str, int] = {}
    for name in whole_tensors(model):
        prefix, stem, _ = _parts(name)
        if stem in _ROTATED:
            rope = model.layer(int(prefix.removeprefix(PREFIXES.name)[:-1])).attention.rope
            found[name] = (rope or model.ropes[0]).dim
    return found


_ROTATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")


def file_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in Hugging Face's files, by its name there."""
    return _shapes(file_places(model), whole_tensors(model))


def gguf_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a GGUF, by its name there."""
    return _shapes(gguf_places(model), whole_tensors(model))


def _shapes(places: dict[str, tuple[str, int]], whole: dict[str, ModelTensor]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, (stored, first) in places.items():
        rows, *rest = whole[name].shape
        found[stored] = (max(first + rows, found.get(stored, (0,))[0]), *rest)
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """(prefix, stem, kind) of a tensor's name in Hugging Face's files or a GGUF: ``model.layers.3.``, ``self_attn.q_proj``, ``weight``."""
    stem, kind = name.rsplit(".", 1)
    layers = next((each for each in (PREFIXES.name, PREFIXES.gguf) if stem.startswith(each)), None)
    if layers is None:
        return "", stem, kind
    number, inner = stem.removeprefix(layers).split(".", 1)
    return f"{layers}{number}.", inner, kind
