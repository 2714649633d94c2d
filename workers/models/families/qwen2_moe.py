"""Qwen 1.5 and 2 with experts, of which one is shared by all tokens behind a gate of its own."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.models.families.expert_names import ROUTER, packed_experts
from workers.models.families.family import DecoderConfig, Family
from workers.protocol.errors import ConfigError
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, SharedExpertSpec


class QwenMoeConfig(DecoderConfig, kw_only=True):
    """What Qwen 2 and 3 have in common. ``num_local_experts``: transformers 5 writes ``num_experts`` so."""

    num_experts: int | None = None
    num_local_experts: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096

    def experts(self, default: int) -> int:
        found = self.num_experts if self.num_experts is not None else self.num_local_experts
        return default if found is None else found

    def sparse(self, attention: AttentionSpec, moe: MoeSpec, windows: Sequence[int | None]) -> ModelSpec:
        """The model whose layers have experts where the config says so, and else dense MLPs."""
        if self.decoder_sparse_step < 1:
            raise ConfigError(f"decoder_sparse_step={self.decoder_sparse_step} does not make sense", "it is at least 1")
        dense = self.mlp_only_layers or []
        return self.model(
            [
                LayerSpec(
                    attention=replace(attention, window=window),
                    mlp=self.mlp() if layer in dense or (layer + 1) % self.decoder_sparse_step else moe,
                )
                for layer, window in enumerate(windows)
            ]
        )


class Qwen2MoeConfig(QwenMoeConfig, kw_only=True):
    num_key_value_heads: int | None = 16
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts_per_tok: int = 4
    qkv_bias: bool = True
    max_window_layers: int = 28


def read(config: Qwen2MoeConfig) -> ModelSpec:
    moe = MoeSpec(
        experts=config.experts(60),
        experts_per_token=config.num_experts_per_tok,
        size=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        activation=config.activation(),
        shared=SharedExpertSpec(size=config.shared_expert_intermediate_size, gated=True),
    )
    windows = config.windows(lambda layer: config.use_sliding_window and layer % 2 == 0 and layer < config.max_window_layers)
    if not config.use_sliding_window:
        windows = [None] * config.num_hidden_layers
    return config.sparse(AttentionSpec(rope=config.rope(), qkv_bias=config.qkv_bias), moe, windows)


FAMILY = Family(model_type="qwen2_moe", config=Qwen2MoeConfig, read=read, tensors=ROUTER, packed=packed_experts())
