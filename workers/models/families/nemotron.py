"""Nemotron 3, 4 and Minitron: LayerNorm by 1 + w with biases, half of each head is rotated, an MLP without a gate."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.llama import LlamaConfig
from workers.protocol.specs import AttentionSpec, ModelSpec, NormSpec


class NemotronConfig(LlamaConfig, kw_only=True):
    hidden_act: str = "relu2"
    norm_eps: float = 1e-5


def read(config: NemotronConfig) -> ModelSpec:
    bias = config.attention_bias
    return config.uniform(
        AttentionSpec(rope=config.rope(partial=0.5), qkv_bias=bias, out_bias=bias),
        config.mlp(bias=config.mlp_bias, gated=False),
        norm=NormSpec(centred=True, plus_one=True, bias=True),
        rms_norm_eps=config.norm_eps,
    )


FAMILY = Family(
    model_type="nemotron",
    config=NemotronConfig,
    read=read,
    gguf=GgufForm(architecture="nemotron", keys={"attention.layer_norm_epsilon": "norm_eps"}),
)
