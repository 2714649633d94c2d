"""Checkpoints as TensorRT-LLM's own converters write them: ``config.json`` with ``architecture``, ``rank<N>.safetensors``, nothing else.

Written by the documented rules (names, cuts, keys), without the package. Must not import it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

#: Keys that every config has and that change nothing.
_USUAL: dict[str, Any] = {
    "logits_dtype": "float32", "hidden_act": "silu", "position_embedding_type": "rope_gpt_neox", "runtime_defaults": None,
    "mlp_bias": False, "residual_mlp": False, "disable_weight_only_quant_plugin": False, "remove_duplicated_kv_heads": False,
    "fc_after_embed": False, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "layer_idx_offset": 0,
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "output_multiplier_scale": 1.0,
    "moe": {"num_experts": 0, "shared_expert_intermediate_size": 0, "top_k": 0, "normalization_mode": 1, "sparse_mixer_epsilon": 0.01},
    "quantization": {
        "quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5, "clamp_val": None,
        "use_meta_recipe": False, "has_zero_point": False, "pre_quant_scale": False, "exclude_modules": None,
    },
}  # fmt: skip


def nvidia_checkpoint(source: Path, target: Path, *, tp: int = 1, pp: int = 1, embedding: str = "whole", head: bool = True) -> Path:
    """Write a folder of ``tiny_model`` as such a checkpoint; returns ``target``. ``embedding``: whole, rows or columns. ``head``: whether
    ``lm_head.weight`` is stored (of a tied model, the embedding)."""
    config, weights = json.loads((source / "config.json").read_text()), load_file(str(source / "model.safetensors"))
    target.mkdir()
    family = config["model_type"]
    keys = _USUAL | {
        "architecture": config["architectures"][0],
        "dtype": "float32",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "intermediate_size": config["intermediate_size"],
        "head_size": config["head_dim"],
        "rotary_embedding_dim": config["head_dim"],
        "qk_layernorm": family == "qwen3",
        "norm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": config["rope_theta"],
        "rotary_scaling": config["rope_scaling"],
        "attn_bias": family == "qwen2",
        "tie_word_embeddings": config["tie_word_embeddings"],
        "use_parallel_embedding": embedding != "whole",
        "embedding_sharding_dim": int(embedding == "columns"),
        "mapping": {
            "world_size": tp * pp,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": tp,
            "pp_size": pp,
            "moe_tp_size": tp,
            "moe_ep_size": 1,
        },
    }
    if family.startswith("qwen"):
        keys |= {"qwen_type": family, "seq_length": 8192}
    (target / "config.json").write_text(json.dumps(keys, indent=4))
    for rank in range(tp * pp):
        tensors = _rank(config, weights, rank % tp, tp, rank // tp, pp, embedding, head)
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, str(target / f"rank{rank}.safetensors"))
    return target


def _rank(
    config: dict[str, Any], weights: dict[str, np.ndarray], tp_rank: int, tp: int, pp_rank: int, pp: int, embedding: str, head: bool
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def cut(values: np.ndarray, axis: int) -> np.ndarray:
        return np.split(values, tp, axis)[tp_rank]

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, -len(values) % tp), (0, 0)))

    def heads(values: np.ndarray) -> np.ndarray:
        """Key/value heads of this rank: copied where there are fewer than ranks."""
        if config["num_key_value_heads"] < tp:
            values = np.repeat(values.reshape(config["num_key_value_heads"], -1, *values.shape[1:]), tp // config["num_key_value_heads"], 0)
            values = values.reshape(-1, *values.shape[2:])
        return cut(values, 0)

    embed = weights["model.embed_tokens.weight"]
    if pp_rank == 0:
        cuts = {"whole": lambda: embed, "rows": lambda: cut(padded(embed), 0), "columns": lambda: cut(embed, 1)}
        found["transformer.vocab_embedding.weight"] = cuts[embedding]()
    for local, layer in enumerate(np.array_split(np.arange(config["num_hidden_layers"]), pp)[pp_rank]):
        of, to = f"model.layers.{layer}.", f"transformer.layers.{local}."
        found[to + "input_layernorm.weight"] = weights[of + "input_layernorm.weight"]
        found[to + "post_layernorm.weight"] = weights[of + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{of}self_attn.q_proj.{kind}" in weights:
                q, k, v = (weights[f"{of}self_attn.{x}_proj.{kind}"] for x in "qkv")
                found[f"{to}attention.qkv.{kind}"] = np.concatenate([cut(q, 0), heads(k), heads(v)])
        for x in "qk":
            if f"{of}self_attn.{x}_norm.weight" in weights:
                found[f"{to}attention.{x}_layernorm.weight"] = weights[f"{of}self_attn.{x}_norm.weight"]
        found[to + "attention.dense.weight"] = cut(weights[of + "self_attn.o_proj.weight"], 1)
        found[to + "mlp.fc.weight"] = cut(weights[of + "mlp.gate_proj.weight"], 0)
        found[to + "mlp.gate.weight"] = cut(weights[of + "mlp.up_proj.weight"], 0)
        found[to + "mlp.proj.weight"] = cut(weights[of + "mlp.down_proj.weight"], 1)
        found[to + "attention.rotary_inv_freq"] = np.ones(4, np.float32)
    if pp_rank == pp - 1:
        found["transformer.ln_f.weight"] = weights["model.norm.weight"]
        if head:
            found["lm_head.weight"] = cut(padded(weights.get("lm_head.weight", embed)), 0)
    return found
