"""OLMo 1: LayerNorm without weights; queries, keys and values may be clipped, which is refused."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm, refuse
from workers.protocol.specs import AttentionSpec, ModelSpec, NormSpec


class OlmoConfig(DecoderConfig, kw_only=True):
    attention_bias: bool = False
    clip_qkv: float | None = None


def read(config: OlmoConfig) -> ModelSpec:
    refuse(clip_qkv=config.clip_qkv)
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qkv_bias=bias, out_bias=bias)
    return config.uniform(attention, norm=NormSpec(centred=True, weight=False), rms_norm_eps=1e-5)


FAMILY = Family(
    model_type="olmo",
    config=OlmoConfig,
    read=read,
    gguf=GgufForm(architecture="olmo", permuted=True, keys={"attention.clamp_kqv": "clip_qkv"}),
)
