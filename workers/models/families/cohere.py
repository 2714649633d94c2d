"""Cohere's Command-R: LayerNorm, attention and MLP side by side, interleaved rope, scaled logits."""

from __future__ import annotations

from workers.models.families.family import DecoderConfig, Family, GgufForm, refuse
from workers.protocol.specs import AttentionSpec, LayerSpec, ModelSpec, NormSpec

#: Of the config, by the keys of a GGUF.
GGUF_KEYS = {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"}


class CohereConfig(DecoderConfig, kw_only=True):
    layer_norm_eps: float = 1e-5
    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_qk_norm: bool = False

    def parallel(self, attention: list[AttentionSpec]) -> ModelSpec:
        """The model whose layers have each its ``attention`` beside the MLP."""
        layers = [LayerSpec(attention=each, mlp=self.mlp(), parallel=True) for each in attention]
        facts = {"norm": NormSpec(centred=True), "rms_norm_eps": self.layer_norm_eps, "logits_divisor": 1.0 / self.logit_scale}
        return self.model(layers, **facts)


def read(config: CohereConfig) -> ModelSpec:
    refuse(use_qk_norm=config.use_qk_norm)
    bias = config.attention_bias
    attention = AttentionSpec(rope=config.rope(theta=500000.0), qkv_bias=bias, out_bias=bias)
    return config.parallel([attention] * config.num_hidden_layers)


FAMILY = Family(
    model_type="cohere",
    config=CohereConfig,
    read=read,
    interleaved=True,
    gguf=GgufForm(architecture="command-r", permuted=True, keys=GGUF_KEYS),
)
