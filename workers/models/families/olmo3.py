"""OLMo 3: OLMo 2 of which three layers of four slide; only the others stretch their rope."""

from __future__ import annotations

from workers.models.families.family import FULL, SLIDING, Family, read_rope
from workers.models.families.olmo2 import POST_NORMS, Olmo2Config
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec, RopeSpec


class Olmo3Config(Olmo2Config, kw_only=True):
    sliding_window: int | None = 4096

    def local_rope(self) -> RopeSpec:
        """Of the layers that slide: never scaled, unless ``rope_parameters`` say it for each type."""
        if SLIDING in (self.rope_parameters or {}):
            return self.rope(theta=500000.0, layer_type=SLIDING)
        return read_rope({"rope_theta": self.rope(theta=500000.0).theta}, self.head_size, self.max_position_embeddings)


def read(config: Olmo3Config) -> ModelSpec:
    windows, bias = config.windows(lambda layer: (layer + 1) % 4 != 0), config.attention_bias
    local, whole = config.local_rope(), config.rope(theta=500000.0, layer_type=FULL)
    layers = []
    for window in windows:
        rope = whole if window is None else local
        attention = AttentionSpec(rope=rope, qk_norm="width", qkv_bias=bias, out_bias=bias, window=window)
        layers.append(LayerSpec(attention=attention, mlp=config.mlp(), pre_norm=False, post_norm=True))
    return config.model(layers)


FAMILY = Family(model_type="olmo3", config=Olmo3Config, read=read, tensors=POST_NORMS)
