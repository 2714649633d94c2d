"""GLM-4-9B as transformers has it: half of each head is rotated, in interleaved pairs; gate and up are one product."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, FileTensor
from workers.protocol.specs import AttentionSpec, ModelSpec

GATE_UP = FileTensor(stem="mlp.gate_up_proj", holds=("mlp.gate_proj", "mlp.up_proj"))


class GlmConfig(DecoderConfig, kw_only=True):
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    rms_norm_eps: float = 1.5625e-7
    attention_bias: bool = True

    def attention(self) -> AttentionSpec:
        return AttentionSpec(rope=self.rope(partial=0.5), qkv_bias=self.attention_bias)


def read(config: GlmConfig) -> ModelSpec:
    return config.uniform(config.attention())


FAMILY = Family(model_type="glm", config=GlmConfig, read=read, tensors=(GATE_UP,), interleaved=True)
