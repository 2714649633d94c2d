"""Llama 2 and 3, and the many models of its shape: SmolLM2, Yi, TinyLlama, DeepSeek's distillations."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.protocol.errors import ConfigError
from workers.protocol.specs import AttentionSpec, ModelSpec


class LlamaConfig(DecoderConfig, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False


def read(config: LlamaConfig) -> ModelSpec:
    for key, value in (("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias)):
        if value:
            raise ConfigError(f"{key}={value} is not supported", "known: False")
    return config.uniform(AttentionSpec(rope=config.rope()))


FAMILY = Family(
    model_type="llama",
    config=LlamaConfig,
    read=read,
    trtllm="LlamaForCausalLM",
    gguf=GgufForm(architecture="llama", permuted=True),
)
