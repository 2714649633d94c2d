"""ERNIE 4.5, dense: Llama with interleaved rope and one switch for all biases."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class Ernie45Config(DecoderConfig, kw_only=True):
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_bias: bool = False


def read(config: Ernie45Config) -> ModelSpec:
    bias = config.use_bias
    return config.uniform(AttentionSpec(rope=config.rope(theta=500000.0), qkv_bias=bias, out_bias=bias), config.mlp(bias=bias))


FAMILY = Family(
    model_type="ernie4_5", config=Ernie45Config, read=read, interleaved=True, gguf=GgufForm(architecture="ernie4_5", permuted=True)
)
