"""Kyutai's Helium: Llama with interleaved rope."""

from __future__ import annotations

from workers.models.families.family import Family
from workers.models.families.llama import LlamaConfig
from workers.protocol.specs import AttentionSpec, ModelSpec


class HeliumConfig(LlamaConfig, kw_only=True):
    rms_norm_eps: float = 1e-8


def read(config: HeliumConfig) -> ModelSpec:
    attention = AttentionSpec(rope=config.rope(theta=100000.0), qkv_bias=config.attention_bias)
    return config.uniform(attention, config.mlp(bias=config.mlp_bias))


FAMILY = Family(model_type="helium", config=HeliumConfig, read=read, interleaved=True)
