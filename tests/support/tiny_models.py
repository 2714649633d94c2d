"""Tiny models and tokenizers for tests: Hugging Face folders that transformers loads too, written from a seed in milliseconds.

Owns the shapes and random weights that tests share. Must not import the package: what it writes is an outside fact that the package
is tested against.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.gguf_blocks import random_blocks

#: Ids of the special tokens; ids 0..255 are the bytes themselves.
ENDOFTEXT, IM_START, IM_END = 256, 257, 258
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [table[byte] for byte in range(256)]


def tiny_tokenizer(folder: Path) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (ChatML, eos ``<|im_end|>``): one token a byte and three special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[2],
        "unk_token": SPECIALS[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def tiny_model(
    folder: Path,
    *,
    architecture: str = "llama",
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 3,
    layers: int = 4,
    ffn: int = 96,
    vocab: int = 320,
    head_dim: int = 8,
    tied: bool = True,
    seed: int = 0,
    integers: bool = False,
    max_position: int = 512,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    files: int = 1,
) -> Path:
    """Write a Hugging Face folder with random fp32 weights and the byte tokenizer; returns ``folder``.

    ``architecture``: llama, mistral, qwen2 (q/k/v biases) or qwen3 (q/k norms). ``integers``: weights are small integers, so that sums of
    products of integers are exact. ``rope_scaling``: as in a Llama 3.1 ``config.json``. ``files`` > 1: sharded, with an index file.
    """
    tiny_tokenizer(folder)
    config: dict[str, Any] = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_position,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tied,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "torch_dtype": "float32",
    }
    if architecture == "mistral":
        config["sliding_window"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, ENDOFTEXT]}))
    shapes = _shapes(architecture, hidden, heads * head_dim, kv_heads * head_dim, head_dim, layers, ffn, vocab, tied)
    rng = np.random.default_rng(seed)
    weights = {name: _draw(rng, name, shape, integers) for name, shape in shapes.items()}
    _save(folder, weights, files)
    return folder


def _shapes(
    architecture: str, hidden: int, q: int, kv: int, head_dim: int, layers: int, ffn: int, vocab: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
        }
        if architecture == "qwen2":
            shapes |= {layer + f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if architecture == "qwen3":
            shapes |= {layer + f"self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
    return shapes


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], integers: bool) -> np.ndarray:
    norm = "norm" in name
    if integers:
        low, high = (1, 3) if norm else (-2, 3)
        return rng.integers(low, high, shape).astype(np.float32)
    if norm:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    # Scaled by fan-in, so that activations keep their size through the layers and logits are well apart.
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _save(folder: Path, weights: dict[str, np.ndarray], files: int) -> None:
    if files == 1:
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    names = sorted(weights)
    index = {}
    for part in range(files):
        file = f"model-{part + 1:05}-of-{files:05}.safetensors"
        chosen = names[part::files]
        save_file({name: weights[name] for name in chosen}, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def tiny_gguf(source: Path, target: Path, kinds: tuple[str, ...] = ("F32",), split: int = 0, **vectors: np.ndarray) -> Path:
    """Write a folder of :func:`tiny_model` as a GGUF file with the format's own package, q and k rows permuted as llama.cpp does.

    ``kinds``: tensor types, assigned to the matrices in turn (rows must be whole blocks); vectors are F32. Of a type that the package
    cannot write, the values are random ones instead of the folder's. ``split``: tensors a file; returns the first file then. ``vectors``:
    more tensors, by name without ``.weight``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    family, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(target), family, split_max_tensors=split)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens = [*_byte_characters(), *SPECIALS]
    tokens += [f"[PAD{id}]" for id in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds_of = {**dict.fromkeys(SPECIALS, TokenType.CONTROL), **dict.fromkeys(tokens[256 + len(SPECIALS) :], TokenType.UNUSED)}
    writer.add_token_types([kinds_of.get(token, TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([])
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    matrices = 0
    for name, values in load_file(str(source / "model.safetensors")).items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            groups = values.reshape(heads if "q_proj" in name else kv_heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(groups.swapaxes(1, 2)).reshape(values.shape)
        kind = GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = GGMLQuantizationType[kinds[matrices % len(kinds)]]
            matrices += 1
        try:
            stored = quantize(values, kind)
        except NotImplementedError:
            stored = random_blocks(kind.name, *values.shape, spread=1 / np.sqrt(values.shape[1]), seed=matrices)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
    for name, values in vectors.items():
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(target.parent.glob(f"{target.stem}-00001-of-*.gguf")) if split else target


def _gguf_name(name: str) -> str:
    renames = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    # The longest name first: one is the end of another.
    for old in sorted(renames, key=len, reverse=True):
        name = name.replace(old, renames[old])
    return name
