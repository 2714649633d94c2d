"""StableLM 2 and 3B: LayerNorm with biases, a quarter of each head is rotated; attention and MLP may stand side by side."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm, refuse
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec, NormSpec


class StableLmConfig(DecoderConfig, kw_only=True):
    layer_norm_eps: float = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False


def read(config: StableLmConfig) -> ModelSpec:
    refuse(qk_layernorm=config.qk_layernorm)
    attention = AttentionSpec(rope=config.rope(partial=0.25), qkv_bias=config.use_qkv_bias)
    layer = LayerSpec(attention=attention, mlp=config.mlp(), parallel=config.use_parallel_residual)
    norm = NormSpec(centred=True, bias=True)
    return config.model([layer] * config.num_hidden_layers, norm=norm, rms_norm_eps=config.layer_norm_eps)


FAMILY = Family(
    model_type="stablelm",
    config=StableLmConfig,
    read=read,
    gguf=GgufForm(
        architecture="stablelm", keys={"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"}
    ),
)
