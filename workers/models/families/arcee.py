"""Arcee's AFM: Llama whose MLP has no gate and squares its ReLU."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.llama import LlamaConfig
from workers.protocol.specs import AttentionSpec, ModelSpec


class ArceeConfig(LlamaConfig, kw_only=True):
    hidden_act: str = "relu2"
    rms_norm_eps: float = 1e-5


def read(config: ArceeConfig) -> ModelSpec:
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qkv_bias=bias, out_bias=bias)
    return config.uniform(attention, config.mlp(bias=config.mlp_bias, gated=False))


FAMILY = Family(model_type="arcee", config=ArceeConfig, read=read, gguf=GgufForm(architecture="arcee", permuted=True))
