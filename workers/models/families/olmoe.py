"""OLMoE: experts in every layer; queries and keys are normed over all heads at once."""

from __future__ import annotations

from workers.models.families.expert_names import ROUTER, packed_experts
from workers.models.families.family import DecoderConfig, Family, refuse
from workers.protocol.specs import AttentionSpec, ModelSpec, MoeSpec


class OlmoeConfig(DecoderConfig, kw_only=True):
    """``num_local_experts``: another name of ``num_experts``."""

    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    clip_qkv: float | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False


def read(config: OlmoeConfig) -> ModelSpec:
    refuse(clip_qkv=config.clip_qkv)
    bias = config.attention_bias
    moe = MoeSpec(
        experts=config.num_experts or config.num_local_experts or 64,
        experts_per_token=config.num_experts_per_tok,
        size=config.intermediate_size,
        renormalise=config.norm_topk_prob,
        activation=config.activation(),
    )
    return config.uniform(AttentionSpec(rope=config.rope(), qk_norm="width", qkv_bias=bias, out_bias=bias), moe)


FAMILY = Family(model_type="olmoe", config=OlmoeConfig, read=read, tensors=ROUTER, packed=packed_experts())
