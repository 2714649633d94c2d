"""Mistral 7B, Nemo and Small (text); all layers slide where there is a window. llama.cpp writes them as Llama."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family
from workers.protocol.specs import AttentionSpec, ModelSpec


class MistralConfig(DecoderConfig, kw_only=True):
    sliding_window: int | None = 4096


def read(config: MistralConfig) -> ModelSpec:
    return config.uniform(AttentionSpec(rope=config.rope()), windows=[config.sliding_window] * config.num_hidden_layers)


FAMILY = Family(model_type="mistral", config=MistralConfig, read=read, trtllm="MistralForCausalLM")
