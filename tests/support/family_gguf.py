"""GGUF files of the families' tiny models, as llama.cpp's converter writes them: names by the format's own package.

Owns what the converter does to values: rows of queries and keys in interleaved rotary order, and norms with their 1 added. Must not import
the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

#: Architectures whose queries and keys the converter brings from halves to neighbouring pairs.
PERMUTED = ("llama", "granite", "smollm3", "arcee", "olmo")
#: Architectures to whose norms it adds 1.
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")


def family_gguf(folder: Path, target: Path, architecture: str, keys: dict[str, Any]) -> Path:
    """Write the model of ``folder`` as ``target``. ``keys``: of the metadata beside those of every model, without the architecture."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, layers = config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(target), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    for key, value in keys.items():
        put = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        put(f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map({name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers)
    for name, values in load_file(folder / "model.safetensors").items():
        if architecture in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            halves = values.reshape(heads if ".q_proj." in name else kv_heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if architecture in PLUS_ONE and name.endswith("norm.weight"):
            values = values + np.float32(1.0)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"the format has no name for {name}"
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
