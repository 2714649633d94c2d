"""Granite 3, dense: Llama with multipliers of embeddings, scores, sublayers and logits."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.llama import LlamaConfig
from workers.protocol.specs import AttentionSpec, ModelSpec


class GraniteConfig(LlamaConfig, kw_only=True):
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0


def read(config: GraniteConfig) -> ModelSpec:
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qkv_bias=bias, out_bias=bias, scale=config.attention_multiplier)
    return config.uniform(
        attention,
        config.mlp(bias=config.mlp_bias),
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_divisor=config.logits_scaling,
    )


FAMILY = Family(
    model_type="granite",
    config=GraniteConfig,
    read=read,
    gguf=GgufForm(
        architecture="granite",
        permuted=True,
        keys={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
)
