"""The names that files of mixtures of experts share: transformers has the same blocks in many families."""

from __future__ import annotations

from workers.models.families.family import FileTensor


def packed_experts(experts: str = "mlp.experts", router: str = "mlp.gate") -> tuple[FileTensor, ...]:
    """Experts as transformers 5 keeps them in memory, and saves them if it has to: those of a layer in two tensors."""
    return (
        FileTensor(stem=router, holds=("mlp.router",)),
        FileTensor(stem=f"{experts}.gate_up_proj", holds=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), bare=True),
        FileTensor(stem=f"{experts}.down_proj", holds=("mlp.experts.*.down_proj",), bare=True),
    )


#: Qwen's and OLMoE's router; their experts have the declared names.
ROUTER = (FileTensor(stem="mlp.gate", holds=("mlp.router",)),)
