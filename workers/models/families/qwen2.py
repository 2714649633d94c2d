"""Qwen 2 and 2.5: queries, keys and values have biases. Where a switch says so, the upper layers slide."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm
from workers.protocol.specs import AttentionSpec, ModelSpec


class Qwen2Config(DecoderConfig, kw_only=True):
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28

    def qwen_windows(self) -> list[int | None]:
        """The window of each layer."""
        windows = self.windows(lambda layer: layer >= self.max_window_layers)
        return windows if self.use_sliding_window else [None] * self.num_hidden_layers


def read(config: Qwen2Config) -> ModelSpec:
    return config.uniform(AttentionSpec(rope=config.rope(), qkv_bias=True), windows=config.qwen_windows())


FAMILY = Family(model_type="qwen2", config=Qwen2Config, read=read, trtllm="Qwen2ForCausalLM", gguf=GgufForm(architecture="qwen2"))
