"""Granite 3, dense: Llama with multipliers of embeddings, scores, sublayers and logits."""

from __future__ import annotations

from workers.models.families.family import Family, GgufForm
from workers.models.families.llama import LlamaConfig
from workers.protocol.specs import AttentionSpec, MlpSpec, ModelSpec, MoeSpec


class GraniteConfig(LlamaConfig, kw_only=True):
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0

    def granite(self, mlp: MlpSpec | MoeSpec) -> ModelSpec:
        """Granite's model, all of whose layers have ``mlp``."""
        bias = self.attention_bias
        return self.uniform(
            AttentionSpec(rope=self.rope(), qkv_bias=bias, out_bias=bias, scale=self.attention_multiplier),
            mlp,
            embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier,
            logits_divisor=self.logits_scaling,
        )


def read(config: GraniteConfig) -> ModelSpec:
    return config.granite(config.mlp(bias=config.mlp_bias))


FAMILY = Family(
    model_type="granite",
    config=GraniteConfig,
    read=read,
    gguf=GgufForm(
        architecture="granite",
        permuted=True,
        keys={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
)
