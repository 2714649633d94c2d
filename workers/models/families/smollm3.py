"""SmolLM 3: every fourth layer does not encode positions."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.llama import LlamaConfig
from workers.protocol.errors import ConfigError
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec


class SmolLm3Config(LlamaConfig, kw_only=True):
    num_key_value_heads: int | None = 4
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4


def read(config: SmolLm3Config) -> ModelSpec:
    count, interval = config.num_hidden_layers, config.no_rope_layer_interval
    rotated = config.no_rope_layers or [int((layer + 1) % interval != 0) for layer in range(count)]
    if len(rotated) < count:
        raise ConfigError(f"no_rope_layers has {len(rotated)} values", f"the model has {count} layers")
    windows = config.windows(lambda layer: config.use_sliding_window and not rotated[layer])
    rope, bias, mlp = config.rope(theta=2e6), config.attention_bias, config.mlp(bias=config.mlp_bias)
    layers = [
        LayerSpec(
            attention=AttentionSpec(rope=rope if rotates else None, qkv_bias=bias, out_bias=bias, window=window),
            mlp=mlp,
        )
        for rotates, window in zip(rotated, windows, strict=False)
    ]
    return config.model(layers)


FAMILY = Family(model_type="smollm3", config=SmolLm3Config, read=read, gguf=GgufForm(architecture="smollm3", permuted=True))
