"""Tiny random models of every family, written by transformers: what the families' tests load, and what transformers computes of it.

Owns the table of cases. A case's weights are drawn from a seed, biases and norms included, which transformers would leave at zeros and
ones. Must not import the package: what it writes is an outside fact that the package is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Longer than windows, original contexts and blocks of the cases.
LONGEST = 160


@dataclass(frozen=True)
class FamilyCase:
    """``model_type`` with ``keys`` of its config; ``served``: max_seq_len of the engine, where the config's own length would differ;
    ``experts``: it is a mixture of experts."""

    name: str
    model_type: str
    keys: dict[str, Any]
    served: int = LONGEST
    experts: bool = False


def _case(name: str, model_type: str | None = None, **keys: Any) -> FamilyCase:
    return FamilyCase(name, model_type or name, keys)


def _moe(name: str, model_type: str | None = None, **keys: Any) -> FamilyCase:
    return FamilyCase(name, model_type or name, keys, experts=True)


def _yarn(**keys: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40} | keys


_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def _longrope(pairs: int, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)], "original_max_position_embeddings": original,
    }  # fmt: skip


CASES = (
    _case("llama"),
    _case("llama-biases", "llama", attention_bias=True, mlp_bias=True),
    _case("llama-linear", "llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    _case("llama-llama3", "llama", rope_parameters=_LLAMA3),
    _case("llama-dynamic", "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    _case("llama-yarn", "llama", rope_parameters=_yarn(beta_fast=16.0, beta_slow=0.5, truncate=False, attention_factor=1.3)),
    _case("mistral", head_dim=32, sliding_window=None),
    _case("mistral-window", "mistral", sliding_window=24),
    _case("qwen2-yarn", "qwen2", rope_parameters=_yarn(mscale=0.7, mscale_all_dim=0.5)),
    _case("qwen2-window", "qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=2),
    _case("qwen3-yarn", "qwen3", rope_parameters=_yarn(), head_dim=32, attention_bias=True),
    _case(
        "granite", attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.3,
        logits_scaling=8.0,
    ),
    _case("smollm3", no_rope_layer_interval=2),
    _case("smollm3-window", "smollm3", no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=30),
    _case("olmo2"),
    _case("olmo2-biases", "olmo2", attention_bias=True, rope_parameters=_yarn()),
    _case("phi3", head_dim=None, sliding_window=40),
    _case(
        "phi3-longrope", "phi3", partial_rotary_factor=0.75, rope_parameters=_longrope(6, 8) | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=8,
    ),
    _case("ministral", layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=24),
    _case("gemma", tie_word_embeddings=True),
    _case("gemma2", sliding_window=21, query_pre_attn_scalar=12, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    _case(
        "gemma3", "gemma3_text", sliding_window=19, sliding_window_pattern=3, query_pre_attn_scalar=12,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    _case("glm"),
    _case("glm4"),
    _case("cohere", logit_scale=0.25, attention_bias=True),
    _case("cohere2", logit_scale=0.5, sliding_window=26, sliding_window_pattern=2),
    _case("olmo"),
    _case("olmo3", sliding_window=22, layer_types=["sliding_attention", "full_attention"] * 2, rope_scaling=_yarn()),
    _case("starcoder2", sliding_window=33),
    _case("stablelm", partial_rotary_factor=0.5, use_qkv_bias=True),
    _case("stablelm-parallel", "stablelm", partial_rotary_factor=0.25, use_parallel_residual=True),
    _case("seed_oss", attention_out_bias=True, mlp_bias=True),
    _case("exaone4", sliding_window=18, layer_types=["sliding_attention", "full_attention"] * 2),
    _case("exaone4-global", "exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
    _case("ernie4_5", use_bias=True),
    _case("arcee", mlp_bias=True, attention_bias=True),
    _case("nemotron", mlp_bias=True, attention_bias=True),
    _case("helium", mlp_bias=True, attention_bias=True),
    _moe("mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=40),
    _moe("qwen3_moe", num_experts=7, num_experts_per_tok=3, moe_intermediate_size=53, norm_topk_prob=True, mlp_only_layers=[1]),
    _moe("qwen3_moe-raw", "qwen3_moe", num_experts=6, num_experts_per_tok=6, moe_intermediate_size=40, norm_topk_prob=False),
    _moe(
        "qwen2_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=53, shared_expert_intermediate_size=37, head_dim=None,
        decoder_sparse_step=2,
    ),
    _moe("olmoe", num_experts=6, num_experts_per_tok=2, head_dim=None),
    _moe("olmoe-renormalised", "olmoe", num_experts=4, num_experts_per_tok=3, norm_topk_prob=True, attention_bias=True, head_dim=None),
    _moe("granitemoe", num_local_experts=5, num_experts_per_tok=2, residual_multiplier=0.22, logits_scaling=3.0, attention_multiplier=0.3),
    _moe("granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=45, embedding_multiplier=2.0),
)  # fmt: skip
#: Those of which `make test` plays one layout: each block and each way of naming tensors once.
REPRESENTATIVE = ("llama-biases", "granite", "smollm3-window", "olmo2", "phi3-longrope", "gemma2", "gemma3", "glm4", "cohere2", "nemotron")
#: Those of which `make test` also deals experts whole, and packs them in the file.
EXPERTS = ("mixtral", "qwen2_moe", "granitemoeshared")


def case_named(name: str) -> FamilyCase:
    return next(case for case in CASES if case.name == name)


def write_family(case: FamilyCase, folder: Path, *, seed: int = 0, packed: bool = False) -> Path:
    """Write the case's model in fp32 with transformers; returns ``folder``. Nine query and three key/value heads, an FFN and a vocabulary
    that nothing divides: every tp above 1 is uneven somewhere. ``packed``: under the names that tensors have in memory, where a layer's
    experts are one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys: dict[str, Any] = {
        "hidden_size": 144, "intermediate_size": 101, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 16, "vocab_size": 331, "max_position_embeddings": LONGEST, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 0,
    }  # fmt: skip
    keys |= case.keys
    config = AutoConfig.for_model(case.model_type, **{key: value for key, value in keys.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, generator)
    model.save_pretrained(folder, save_original_format=not packed)
    return folder


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    drawn = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        parameter.copy_(0.3 * drawn)
    elif parameter.dim() == 1:  # norms
        parameter.copy_(0.3 * drawn + parameter.mean())
    else:
        parameter.copy_(drawn / parameter.shape[-1] ** 0.5)


def family_logprobs(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """transformers' log-probabilities [tokens, vocabulary] of the token after each of ``sequences``, fp32."""
    from transformers import AutoModelForCausalLM

    # transformers' grouped products take sizes in multiples of 16 bytes only.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in sequences]
