"""Seed-OSS: Llama with biases that each product has a switch for."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, FileTensor, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class SeedOssConfig(DecoderConfig, kw_only=True):
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    attention_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False


def read(config: SeedOssConfig) -> ModelSpec:
    attention = AttentionSpec(rope=config.rope(), qkv_bias=config.attention_bias, out_bias=config.attention_out_bias)
    return config.uniform(attention, config.mlp(bias=config.mlp_bias))


FAMILY = Family(
    model_type="seed_oss",
    config=SeedOssConfig,
    read=read,
    gguf=GgufForm(architecture="seed_oss", tensors=(FileTensor(stem="post_attention_norm", holds=("ffn_norm",)),)),
)
