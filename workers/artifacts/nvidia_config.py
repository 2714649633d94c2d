"""``config.json`` of a checkpoint that TensorRT-LLM's own converters wrote: the model, the layout, and the split of the embedding.

Absent keys have the defaults of TensorRT-LLM's config classes. A key that would change the model and is not supported is refused by name.
The tensors have the names of :mod:`workers.layout.sharding`, which are TensorRT-LLM's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from workers.artifacts.safetensors_file import COPY_AGAIN, SUPPORTED_MODELS
from workers.models.families.family import read_rope
from workers.models.registry import trtllm_families
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import DType, ModelSpec, Parallel, Quant, uniform_decoder

#: The split of the embedding among the ranks of a first stage: by rows, by columns, or none (each rank has all of it).
EmbeddingCut: TypeAlias = Literal["rows", "columns", "whole"]
DTYPES: dict[str, DType] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: Keys that change the model, with the value that changes nothing.
_NEUTRAL = {
    "mlp_bias": False,
    "residual_mlp": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_logn_attn": False,
    "remove_duplicated_kv_heads": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "rotary_pct": 1.0,
    "moe_num_experts": 0,
}
#: TensorRT-LLM's defaults of a llama3 scaling.
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Mapping(msgspec.Struct, frozen=True, kw_only=True):
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    pp_partition: list[int] | None = None


class _Quantization(msgspec.Struct, kw_only=True):
    quant_algo: str | None = None


class _Moe(msgspec.Struct, kw_only=True):
    num_experts: int = 0


class _Config(msgspec.Struct, kw_only=True):
    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    head_size: int | None = None
    norm_epsilon: float = 1e-5
    position_embedding_type: str = "learned_absolute"
    rotary_embedding_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    attn_bias: bool | None = None
    qwen_type: str | None = None
    mapping: _Mapping = _Mapping()
    quantization: _Quantization | None = None
    moe: _Moe | None = None
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0


class NvidiaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the config says. ``model`` has an untied head; whether one is stored is for the weights to say."""

    model: ModelSpec
    dtype: DType
    parallel: Parallel
    quant: Quant
    embedding: EmbeddingCut


def read_config(path: Path, raw: dict[str, Any]) -> NvidiaConfig:
    """Raises :class:`ArtifactError`, naming what is missing or not supported."""
    try:
        config = msgspec.convert(raw, _Config)
        family = _family(path, config)
        _refuse(path, raw, config, family)
        scaling = config.rotary_scaling or {}
        if "llama3" in (scaling.get("rope_type"), scaling.get("type")):
            scaling = _LLAMA3 | scaling
        if (scaled := scaling.get("rope_type", scaling.get("type", "default"))) not in ("default", "linear", "llama3"):
            raise ConfigError(f"rope scaling {scaled!r} is not supported", "known: linear, llama3", SUPPORTED_MODELS)
        rope = read_rope({"rope_theta": config.rotary_base} | scaling, _head_size(config), config.max_position_embeddings)
        algo = config.quantization.quant_algo if config.quantization else None
        model = uniform_decoder(
            architecture=family,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size or 4 * config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=_head_size(config),
            vocab_size=config.vocab_size,
            max_position=config.max_position_embeddings,
            rms_norm_eps=config.norm_epsilon,
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            qkv_bias=family == "qwen2",
            qk_norm="head" if family == "qwen3" else None,
        )
        return NvidiaConfig(
            model=model,
            dtype=DTYPES[config.dtype],
            parallel=Parallel(tp=config.mapping.tp_size, pp=config.mapping.pp_size),
            quant=Quant() if algo == "NO_QUANT" else Quant(quant_algo=algo),
            embedding=_embedding(config),
        )
    except (ConfigError, msgspec.ValidationError) as error:
        raise ArtifactError(f"{path} does not make sense", str(error), COPY_AGAIN) from error


def _family(path: Path, config: _Config) -> str:
    """The model family; Qwen's architecture names do not always say which."""
    named = config.architecture.lower().removesuffix("forcausallm")
    family = (config.qwen_type if named.startswith("qwen") else None) or named
    if family not in (families := trtllm_families()) or not config.architecture.endswith("ForCausalLM"):
        known = ", ".join(families)
        raise ArtifactError(f"{path}: architecture {config.architecture!r} is not supported", f"known: {known}", SUPPORTED_MODELS)
    return family


def _refuse(path: Path, raw: dict[str, Any], config: _Config, family: str) -> None:
    if config.moe is not None and config.moe.num_experts:
        raise ArtifactError(f"{path}: mixture of experts is not supported", f"num_experts is {config.moe.num_experts}", SUPPORTED_MODELS)
    bias = family == "qwen2" if config.attn_bias is None else config.attn_bias
    mapping = config.mapping
    for key, value, wanted in (
        ("hidden_act", config.hidden_act, ("silu", "swiglu")),
        ("position_embedding_type", config.position_embedding_type, ("rope_gpt_neox",)),
        ("dtype", config.dtype, tuple(DTYPES)),
        ("attn_bias", bias, (family == "qwen2",)),
        ("rotary_embedding_dim", config.rotary_embedding_dim, (None, _head_size(config))),
        ("mapping.cp_size", mapping.cp_size, (1,)),
        ("mapping.pp_partition", mapping.pp_partition, (None,)),
        ("mapping.world_size", mapping.world_size, (mapping.tp_size * mapping.pp_size,)),
        *((key, raw.get(key), (neutral, None)) for key, neutral in _NEUTRAL.items()),
    ):
        if value not in wanted:
            raise ArtifactError(f"{path}: {key}={value} is not supported", f"known: {', '.join(map(str, wanted))}", SUPPORTED_MODELS)


def _head_size(config: _Config) -> int:
    return config.head_size or config.hidden_size // max(1, config.num_attention_heads)


def _embedding(config: _Config) -> EmbeddingCut:
    if not config.use_parallel_embedding or config.mapping.tp_size == 1:
        return "whole"
    return "columns" if config.embedding_sharding_dim == 1 else "rows"
