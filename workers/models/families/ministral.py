"""Ministral 8B: Mistral whose config says which layers slide."""

from __future__ import annotations

from workers.models.families.family import Family
from workers.models.families.mistral import MistralConfig
from workers.protocol.specs import AttentionSpec, ModelSpec


def read(config: MistralConfig) -> ModelSpec:
    return config.uniform(AttentionSpec(rope=config.rope()), windows=config.windows())


FAMILY = Family(model_type="ministral", config=MistralConfig, read=read)
