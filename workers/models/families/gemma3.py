"""Gemma 3, text: five layers of six slide, with a rope of their own; the others stretch theirs. Queries and keys are normed by heads."""

from __future__ import annotations

from functools import partial
from typing import Any

from workers.models.families.family import FULL, SLIDING, Family, GgufForm, read_rope
from workers.models.families.gemma import NORM
from workers.models.families.gemma2 import GGUF_KEYS, NORMS, Gemma2Config, score_scale
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec, RopeSpec


class Gemma3Config(Gemma2Config, kw_only=True):
    # Configs of the larger models leave out what the first release's class has as defaults.
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    vocab_size: int = 262_208
    max_position_embeddings: int = 131_072
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window_pattern: int = 6
    rope_local_base_freq: float = 1e4

    def local_rope(self) -> RopeSpec:
        """Of the layers that slide. Releases before transformers 5 write its base alone, and it is never scaled."""
        given: dict[str, Any] = self.rope_parameters or {}
        if SLIDING in given:
            return self.rope(layer_type=SLIDING, theta=1e4)
        return read_rope({"rope_theta": self.rope_local_base_freq}, self.head_size, self.max_position_embeddings)


def read(config: Gemma3Config) -> ModelSpec:
    windows = config.windows(lambda layer: (layer + 1) % config.sliding_window_pattern != 0)
    local, whole = config.local_rope(), config.rope(layer_type=FULL, theta=1e6)
    layers = []
    for window in windows:
        attention = AttentionSpec(
            rope=whole if window is None else local,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            qk_norm="head",
            scale=config.query_pre_attn_scalar**-0.5,
            window=window,
            softcap=config.attn_logit_softcapping,
        )
        layers.append(LayerSpec(attention=attention, mlp=config.mlp(), post_norm=True))
    return config.model(layers, norm=NORM, embedding_multiplier=config.hidden_size**0.5, logits_softcap=config.final_logit_softcapping)


FAMILY = Family(
    model_type="gemma3_text",
    config=Gemma3Config,
    read=read,
    tensors=NORMS,
    gguf=GgufForm(architecture="gemma3", keys=GGUF_KEYS, facts=partial(score_scale, largest=62)),
)
