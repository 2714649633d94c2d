"""Qwen 2 and 2.5: queries, keys and values have biases."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class Qwen2Config(DecoderConfig, kw_only=True):
    use_sliding_window: bool = False


def read(config: Qwen2Config) -> ModelSpec:
    window = config.sliding_window if config.use_sliding_window else None
    return config.uniform(AttentionSpec(rope=config.rope(), qkv_bias=True), window=window)


FAMILY = Family(model_type="qwen2", config=Qwen2Config, read=read, trtllm="Qwen2ForCausalLM", gguf=GgufForm(architecture="qwen2"))
