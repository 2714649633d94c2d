"""EXAONE 4: what attention and MLP give is normed; where layers slide, only those are rotated."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.models.families.olmo2 import POST_NORMS
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec


class Exaone4Config(DecoderConfig, kw_only=True):
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    sliding_window_pattern: int | str | None = 4

    def slides(self, layer: int) -> bool:
        """Whether the layer slides; the pattern is a period, or a letter for each layer of one: L = local."""
        pattern = self.sliding_window_pattern
        if not pattern or self.sliding_window is None:
            return False
        return pattern[layer % len(pattern)] == "L" if isinstance(pattern, str) else (layer + 1) % pattern != 0


def read(config: Exaone4Config) -> ModelSpec:
    rope, bounded = config.rope(), config.sliding_window is not None
    layers = []
    for window in config.windows(config.slides):
        attention = AttentionSpec(rope=rope if window is not None or not bounded else None, qk_norm="head", window=window)
        layers.append(LayerSpec(attention=attention, mlp=config.mlp(), pre_norm=False, post_norm=True))
    return config.model(layers)


FAMILY = Family(
    model_type="exaone4",
    config=Exaone4Config,
    read=read,
    tensors=POST_NORMS,
    gguf=GgufForm(architecture="exaone4", keys={"attention.sliding_window": "sliding_window"}),
)
