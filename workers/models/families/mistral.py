"""Mistral 7B, Nemo and Small (text). llama.cpp writes them as Llama."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family
from workers.protocol.specs import AttentionSpec, ModelSpec


def read(config: DecoderConfig) -> ModelSpec:
    return config.uniform(AttentionSpec(rope=config.rope()), window=config.sliding_window)


FAMILY = Family(model_type="mistral", config=DecoderConfig, read=read, trtllm="MistralForCausalLM")
