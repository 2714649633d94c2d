"""Gemma 1: norms by 1 + w, embeddings times the square root of their size, GELU by tanh."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm, refuse
from workers.protocol.specs import AttentionSpec, ModelSpec, NormSpec

NORM = NormSpec(plus_one=True)


class GemmaConfig(DecoderConfig, kw_only=True):
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: bool | None = None

    def __post_init__(self) -> None:
        refuse(use_bidirectional_attention=self.use_bidirectional_attention)
        # The first releases name the exact GELU and mean the one by tanh.
        self.hidden_act = "gelu_pytorch_tanh" if self.hidden_act == "gelu" else self.hidden_act
        self.hidden_act = self.hidden_activation or self.hidden_act


def read(config: GemmaConfig) -> ModelSpec:
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qkv_bias=bias, out_bias=bias)
    return config.uniform(attention, norm=NORM, embedding_multiplier=config.hidden_size**0.5)


FAMILY = Family(model_type="gemma", config=GemmaConfig, read=read, gguf=GgufForm(architecture="gemma"))
