"""The default model, converted once into a cache, and the same weights in transformers: the ground truth of the portable engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from workers.artifacts.artifact import open_artifact
from workers.protocol.errors import TriremeError
from workers.protocol.specs import DType, Parallel

NAME = "smollm2-135m-instruct"


def artifact(parallel: Parallel | None = None, dtype: DType = "fp32") -> Path:
    """The converted default model for ``parallel``; skips the test, and says why, where it cannot be had."""
    from orchestrator.model_store import resolve

    cache = Path(os.environ.get("TRIREME_TEST_CACHE", Path.home() / ".cache" / "trireme"))
    try:
        return resolve(NAME, parallel=parallel or Parallel(), dtype=dtype, cache=cache)
    except TriremeError as error:
        pytest.skip(f"no default model: {error}")


def transformers_model(dtype: torch.dtype = torch.float32) -> Any:
    """transformers' LlamaForCausalLM with the default model's weights, from the tp=1 pp=1 checkpoint, by our own renaming."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = artifact()
    model = open_artifact(folder).model
    weights = load_file(folder / "rank0.safetensors")
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.widest_mlp,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.ropes[0].theta},
        tie_word_embeddings=True,
    )
    state = {
        "model.embed_tokens.weight": weights["transformer.vocab_embedding.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
    }
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for layer in range(model.num_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        parts = weights[ours + "attention.qkv.weight"].split((q, kv, kv))
        state |= {f"{theirs}self_attn.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)}
        for name, source in (
            ("self_attn.o_proj", "attention.dense"),
            ("mlp.gate_proj", "mlp.fc"),
            ("mlp.up_proj", "mlp.gate"),
            ("mlp.down_proj", "mlp.proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_layernorm"),
        ):
            state[f"{theirs}{name}.weight"] = weights[f"{ours}{source}.weight"]
    found = LlamaForCausalLM(config).eval()
    missing, unexpected = found.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    found.tie_weights()
    return found.to(dtype)
