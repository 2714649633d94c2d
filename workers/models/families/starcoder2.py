"""StarCoder 2: LayerNorm, biases everywhere, an MLP without a gate; all layers slide."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, FileTensor, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec, NormSpec


class StarCoder2Config(DecoderConfig, kw_only=True):
    num_key_value_heads: int | None = 2
    hidden_act: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    use_bias: bool = True


def read(config: StarCoder2Config) -> ModelSpec:
    return config.uniform(
        AttentionSpec(rope=config.rope(), qkv_bias=config.use_bias, out_bias=config.use_bias),
        config.mlp(bias=config.use_bias, gated=False),
        windows=[config.sliding_window] * config.num_hidden_layers,
        norm=NormSpec(centred=True, bias=True),
        rms_norm_eps=config.norm_epsilon,
    )


FAMILY = Family(
    model_type="starcoder2",
    config=StarCoder2Config,
    read=read,
    tensors=(FileTensor(stem="mlp.c_fc", holds=("mlp.up_proj",)), FileTensor(stem="mlp.c_proj", holds=("mlp.down_proj",))),
    gguf=GgufForm(architecture="starcoder2", keys={"attention.layer_norm_epsilon": "norm_epsilon"}),
)
