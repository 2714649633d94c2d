"""Granite 3 with experts, with or without an expert that all tokens share."""

from __future__ import annotations

from workers.models.families.expert_names import packed_experts
from workers.models.families.family import Family, FileTensor
from workers.models.families.granite import GraniteConfig
from workers.protocol.specs import ModelSpec, MoeSpec, SharedExpertSpec


class GraniteMoeConfig(GraniteConfig, kw_only=True):
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0


def read(config: GraniteMoeConfig) -> ModelSpec:
    moe = MoeSpec(
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        size=config.intermediate_size,
        activation=config.activation(),
        shared=SharedExpertSpec(size=config.shared_intermediate_size) if config.shared_intermediate_size else None,
    )
    return config.granite(moe)


_SHARED = (
    FileTensor(stem="shared_mlp.input_linear", holds=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    FileTensor(stem="shared_mlp.output_linear", holds=("mlp.shared_expert.down_proj",)),
)
_TENSORS = (
    FileTensor(stem="block_sparse_moe.router.layer", holds=("mlp.router",)),
    FileTensor(stem="block_sparse_moe.input_linear", holds=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    FileTensor(stem="block_sparse_moe.output_linear", holds=("mlp.experts.*.down_proj",)),
    *_SHARED,
)
_PACKED = (*packed_experts("block_sparse_moe.experts", "block_sparse_moe.router"), *_SHARED)

FAMILY = Family(model_type="granitemoe", config=GraniteMoeConfig, read=read, tensors=_TENSORS, packed=_PACKED)
SHARED_FAMILY = Family(model_type="granitemoeshared", config=GraniteMoeConfig, read=read, tensors=_TENSORS, packed=_PACKED)
