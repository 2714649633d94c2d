"""Qwen 3, dense: each head of queries and keys is normed."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.qwen2 import Qwen2Config
from workers.protocol.specs import AttentionSpec, ModelSpec


class Qwen3Config(Qwen2Config, kw_only=True):
    attention_bias: bool = False


def read(config: Qwen3Config) -> ModelSpec:
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(), qk_norm="head", qkv_bias=bias, out_bias=bias)
    return config.uniform(attention, windows=config.qwen_windows())


FAMILY = Family(model_type="qwen3", config=Qwen3Config, read=read, trtllm="Qwen3ForCausalLM", gguf=GgufForm(architecture="qwen3"))
