"""Cohere's Command-R7B and Command-A: three layers of four slide and are rotated, the others do not encode positions."""

from __future__ import annotations

from workers.models.families.cohere import GGUF_KEYS, CohereConfig
from workers.models.families.family import Family, GgufForm, refuse
from workers.protocol.specs import AttentionSpec, ModelSpec


class Cohere2Config(CohereConfig, kw_only=True):
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 4


def read(config: Cohere2Config) -> ModelSpec:
    refuse(use_qk_norm=config.use_qk_norm)
    windows = config.windows(lambda layer: (layer + 1) % config.sliding_window_pattern != 0)
    rope, bias = config.rope(), config.attention_bias
    return config.parallel(
        [AttentionSpec(rope=rope if window else None, qkv_bias=bias, out_bias=bias, window=window) for window in windows]
    )


FAMILY = Family(
    model_type="cohere2",
    config=Cohere2Config,
    read=read,
    interleaved=True,
    gguf=GgufForm(architecture="cohere2", permuted=True, keys={**GGUF_KEYS, "attention.sliding_window": "sliding_window"}),
)
