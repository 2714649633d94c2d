"""Llama 2 and 3, and the many models of its shape: SmolLM2, Yi, TinyLlama, DeepSeek's distillations."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class LlamaConfig(DecoderConfig, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False


def read(config: LlamaConfig) -> ModelSpec:
    attention = AttentionSpec(rope=config.rope(), qkv_bias=config.attention_bias, out_bias=config.attention_bias)
    return config.uniform(attention, config.mlp(bias=config.mlp_bias))


FAMILY = Family(
    model_type="llama",
    config=LlamaConfig,
    read=read,
    trtllm="LlamaForCausalLM",
    gguf=GgufForm(architecture="llama", permuted=True),
)
