"""Qwen 3 with experts."""

from __future__ import annotations

from workers.models.families.expert_names import ROUTER, packed_experts
from workers.models.families.family import Family
from workers.models.families.qwen2_moe import QwenMoeConfig
from workers.protocol.specs import AttentionSpec, ModelSpec, MoeSpec


class Qwen3MoeConfig(QwenMoeConfig, kw_only=True):
    num_key_value_heads: int | None = 4
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    attention_bias: bool = False


def read(config: Qwen3MoeConfig) -> ModelSpec:
    bias = config.attention_bias
    moe = MoeSpec(
        experts=config.experts(128),
        experts_per_token=config.num_experts_per_tok,
        size=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        activation=config.activation(),
    )
    window = config.sliding_window if config.use_sliding_window else None
    attention = AttentionSpec(rope=config.rope(), qk_norm="head", qkv_bias=bias, out_bias=bias)
    return config.sparse(attention, moe, [window] * config.num_hidden_layers)


FAMILY = Family(model_type="qwen3_moe", config=Qwen3MoeConfig, read=read, tensors=ROUTER, packed=packed_experts())
