"""Gemma 2: every other layer slides; norms before and after attention and MLP, soft caps of scores and logits."""

from __future__ import annotations

from functools import partial
from typing import Any

from workers.models.families.family import Family, FileTensor, GgufForm
from workers.models.families.gemma import NORM, GemmaConfig
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec

#: The four norms of a layer by their names in Gemma's files.
NORMS = (
    FileTensor(stem="post_attention_layernorm", holds=("post_self_attn_layernorm",)),
    FileTensor(stem="pre_feedforward_layernorm", holds=("post_attention_layernorm",)),
    FileTensor(stem="post_feedforward_layernorm", holds=("post_mlp_layernorm",)),
)

#: Of the config, by the keys of a GGUF.
GGUF_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def score_scale(config: dict[str, Any], *, largest: int) -> dict[str, Any]:
    """What a GGUF does not say: scores are scaled by the size of a head, and in the largest model, of so many layers, by that of an equal
    share of the hidden state."""
    share = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": share if config["num_hidden_layers"] == largest else config["head_dim"]}


class Gemma2Config(GemmaConfig, kw_only=True):
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0


def read(config: Gemma2Config) -> ModelSpec:
    windows = config.windows(lambda layer: (layer + 1) % 2 != 0)
    attention = AttentionSpec(
        rope=config.rope(),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
    )
    layers = [LayerSpec(attention=attention.sliding(window), mlp=config.mlp(), post_norm=True) for window in windows]
    return config.model(layers, norm=NORM, embedding_multiplier=config.hidden_size**0.5, logits_softcap=config.final_logit_softcapping)


FAMILY = Family(
    model_type="gemma2",
    config=Gemma2Config,
    read=read,
    tensors=NORMS,
    gguf=GgufForm(architecture="gemma2", keys=GGUF_KEYS, facts=partial(score_scale, largest=46)),
)
