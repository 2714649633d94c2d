"""Shapes of well-known models, so that a plan needs no file of theirs. Owns nothing else: weights come from elsewhere."""

from __future__ import annotations

from typing import Any

from workers.protocol.specs import AttentionSpec, LayerSpec, Llama3Scaling, ModelSpec, MoeSpec, RopeSpec, model_spec, uniform_decoder

_ROPE = Llama3Scaling(factor=8.0)


def _llama_31(hidden: int, ffn: int, layers: int, heads: int) -> ModelSpec:
    return uniform_decoder(
        architecture="llama", hidden_size=hidden, intermediate_size=ffn, num_layers=layers, num_heads=heads, num_kv_heads=8,
        head_dim=128, vocab_size=128256, max_position=131072, rope_theta=500000.0, rope_scaling=_ROPE,
    )  # fmt: skip


def _qwen3(hidden: int, ffn: int, layers: int, heads: int) -> ModelSpec:
    return uniform_decoder(
        architecture="qwen3", hidden_size=hidden, intermediate_size=ffn, num_layers=layers, num_heads=heads, num_kv_heads=8,
        head_dim=128, vocab_size=151936, max_position=40960, rms_norm_eps=1e-6, rope_theta=1e6, qk_norm="head",
    )  # fmt: skip


def _moe(attention: AttentionSpec, moe: MoeSpec, layers: int, **facts: Any) -> ModelSpec:
    return model_spec([LayerSpec(attention=attention, mlp=moe)] * layers, head_dim=128, **facts)


#: By the name that a deployment file gives as ``path`` or ``name``. Sizes as in each model's published ``config.json``.
SHAPES = {
    "smollm2-135m-instruct": uniform_decoder(
        architecture="llama", hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, vocab_size=49152, max_position=8192, rope_theta=100000.0, tied_embeddings=True,
    ),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _moe(
        AttentionSpec(rope=RopeSpec(dim=128, theta=1e6), qk_norm="head"), MoeSpec(experts=128, experts_per_token=8, size=768), 48,
        architecture="qwen3_moe", hidden_size=2048, num_heads=32, num_kv_heads=4, vocab_size=151936, max_position=40960, rms_norm_eps=1e-6,
    ),
    "mixtral-8x7b": _moe(
        AttentionSpec(rope=RopeSpec(dim=128, theta=1e6)), MoeSpec(experts=8, experts_per_token=2, size=14336), 32,
        architecture="mixtral", hidden_size=4096, num_heads=32, num_kv_heads=8, vocab_size=32000, max_position=32768,
    ),
    "llama-3.1-8b": _llama_31(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama_31(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama_31(16384, 53248, 126, 128),
}  # fmt: skip
