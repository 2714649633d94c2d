"""The model families that run, in one table. One more family is one file in :mod:`workers.models.families` and one line here."""

from __future__ import annotations

from workers.layout.sharding import whole_tensors
from workers.models.families import llama, mistral, qwen2, qwen3
from workers.models.families.family import Family
from workers.protocol.specs import DivisorScaling, LongRopeScaling, ModelSpec, YarnScaling

#: By ``model_type``.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
    )
}


def gguf_families() -> dict[str, Family]:
    """The families whose GGUFs are read, by llama.cpp's name of the architecture."""
    return {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}


def trtllm_families() -> dict[str, Family]:
    """The families that TensorRT-LLM's checkpoint format names, by ``model_type``."""
    return {family.model_type: family for family in FAMILIES.values() if family.trtllm is not None}


def trtllm_gap(model: ModelSpec) -> str:
    """What of the model TensorRT-LLM's checkpoint format has no key for; empty where it says all."""
    kinds = [kind.attention for kind in model.kinds]
    if model.architecture not in trtllm_families():
        return f"the format does not name the family {model.architecture!r}"
    if any(isinstance(rope.scaling, YarnScaling | LongRopeScaling | DivisorScaling) for rope in model.ropes):
        return "the format's keys for a scaling by YaRN, LongRoPE or stored divisors are not written here"
    if len(model.kinds) > 1 or any(kind.out_bias or kind.scale is not None for kind in kinds) or model.kinds[0].mlp.bias:
        return "it has biases or scales for which this architecture has no key in the format"
    if model.architecture == "llama" and kinds[0].qkv_bias:
        return "it has biases for which this architecture has no key in the format"
    return ""


def file_places(model: ModelSpec) -> dict[str, tuple[str, int]]:
    """Where Hugging Face's files hold each whole tensor: (name there, first row), by the tensor's own name."""
    whole = whole_tensors(model)
    held = {stem: file for file in FAMILIES[model.architecture].tensors for stem in file.holds}
    found: dict[str, tuple[str, int]] = {}
    for name in whole:
        prefix, stem, kind = _parts(name)
        if stem not in held:
            found[name] = (name, 0)
            continue
        before = held[stem].holds[: held[stem].holds.index(stem)]
        found[name] = (f"{prefix}{held[stem].stem}.{kind}", sum(whole[f"{prefix}{each}.{kind}"].shape[0] for each in before))
    return found


def file_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in Hugging Face's files, by its name there."""
    whole, found = whole_tensors(model), dict[str, tuple[int, ...]]()
    for name, (stored, first) in file_places(model).items():
        rows, *rest = whole[name].shape
        found[stored] = (first + rows, *rest)
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """(prefix, stem, kind) of a whole tensor's name: ``model.layers.3.``, ``self_attn.q_proj``, ``weight``."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return "", stem, kind
    number, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"model.layers.{number}.", inner, kind
