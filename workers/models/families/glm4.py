"""GLM-4-0414, 9B and 32B: GLM with norms after attention and MLP too, which have the declared names."""

from __future__ import annotations

from workers.models.families.family import Family, FileTensor, GgufForm
from workers.models.families.glm import GATE_UP, GlmConfig
from workers.protocol.specs import LayerSpec, ModelSpec


def read(config: GlmConfig) -> ModelSpec:
    layer = LayerSpec(attention=config.attention(), mlp=config.mlp(), post_norm=True)
    return config.model([layer] * config.num_hidden_layers)


FAMILY = Family(
    model_type="glm4",
    config=GlmConfig,
    read=read,
    tensors=(GATE_UP,),
    interleaved=True,
    gguf=GgufForm(architecture="glm4", permuted=True, tensors=(FileTensor(stem="ffn_up", holds=("ffn_gate", "ffn_up")),)),
)
