"""OLMo 2: what attention and MLP give is normed, not what they read; queries and keys are normed over all heads at once."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, FileTensor, GgufForm
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec

#: Norms after attention and MLP, as OLMo and EXAONE name them.
POST_NORMS = (
    FileTensor(stem="post_attention_layernorm", holds=("post_self_attn_layernorm",)),
    FileTensor(stem="post_feedforward_layernorm", holds=("post_mlp_layernorm",)),
)


class Olmo2Config(DecoderConfig, kw_only=True):
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False


def read(config: Olmo2Config) -> ModelSpec:
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qk_norm="width", qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention=attention, mlp=config.mlp(), pre_norm=False, post_norm=True)
    return config.model([layer] * config.num_hidden_layers)


FAMILY = Family(model_type="olmo2", config=Olmo2Config, read=read, tensors=POST_NORMS, gguf=GgufForm(architecture="olmo2"))
