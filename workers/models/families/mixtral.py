"""Mixtral: Mistral with experts. llama.cpp writes it as Llama."""

from __future__ import annotations

from workers.models.families.expert_names import packed_experts
from workers.models.families.family import DecoderConfig, Family, FileTensor
from workers.protocol.specs import AttentionSpec, ModelSpec, MoeSpec


class MixtralConfig(DecoderConfig, kw_only=True):
    num_key_value_heads: int | None = 8
    rms_norm_eps: float = 1e-5
    num_local_experts: int = 8
    num_experts_per_tok: int = 2


def read(config: MixtralConfig) -> ModelSpec:
    moe = MoeSpec(
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        size=config.intermediate_size,
        activation=config.activation(),
    )
    return config.uniform(AttentionSpec(rope=config.rope(theta=1e6)), moe, windows=[config.sliding_window] * config.num_hidden_layers)


FAMILY = Family(
    model_type="mixtral",
    config=MixtralConfig,
    read=read,
    tensors=(
        FileTensor(stem="block_sparse_moe.gate", holds=("mlp.router",)),
        FileTensor(stem="block_sparse_moe.experts.*.w1", holds=("mlp.experts.*.gate_proj",)),
        FileTensor(stem="block_sparse_moe.experts.*.w3", holds=("mlp.experts.*.up_proj",)),
        FileTensor(stem="block_sparse_moe.experts.*.w2", holds=("mlp.experts.*.down_proj",)),
    ),
    packed=packed_experts(),
)
