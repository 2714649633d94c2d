"""Phi-3, Phi-4 and Phi-4-mini: fused products, longrope, a part of each head is rotated."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, FileTensor, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class Phi3Config(DecoderConfig, kw_only=True):
    rms_norm_eps: float = 1e-5
    original_max_position_embeddings: int | None = 4096

    def __post_init__(self) -> None:
        # Old names of longrope, of which the second means another scaling elsewhere.
        for keys in (self.rope_scaling, self.rope_parameters):
            for key in ("type", "rope_type"):
                if keys and keys.get(key) in ("su", "yarn"):
                    keys[key] = "longrope"


def read(config: Phi3Config) -> ModelSpec:
    return config.uniform(AttentionSpec(rope=config.rope(partial=1.0)), windows=[config.sliding_window] * config.num_hidden_layers)


FAMILY = Family(
    model_type="phi3",
    config=Phi3Config,
    read=read,
    tensors=(
        FileTensor(stem="self_attn.qkv_proj", holds=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        FileTensor(stem="mlp.gate_up_proj", holds=("mlp.gate_proj", "mlp.up_proj")),
    ),
    gguf=GgufForm(
        architecture="phi3",
        keys={"attention.sliding_window": "sliding_window"},
        tensors=(
            FileTensor(stem="attn_qkv", holds=("attn_q", "attn_k", "attn_v")),
            FileTensor(stem="ffn_up", holds=("ffn_gate", "ffn_up")),
        ),
    ),
)
