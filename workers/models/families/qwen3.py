"""Qwen 3, dense: each head of queries and keys is normed."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.qwen2 import Qwen2Config
from workers.protocol.errors import ConfigError
from workers.protocol.specs import AttentionSpec, ModelSpec


class Qwen3Config(Qwen2Config, kw_only=True):
    attention_bias: bool = False


def read(config: Qwen3Config) -> ModelSpec:
    if config.attention_bias:
        raise ConfigError("attention_bias=True is not supported", "known: False")
    window = config.sliding_window if config.use_sliding_window else None
    return config.uniform(AttentionSpec(rope=config.rope(), qk_norm="head"), window=window)


FAMILY = Family(model_type="qwen3", config=Qwen3Config, read=read, trtllm="Qwen3ForCausalLM", gguf=GgufForm(architecture="qwen3"))
