"""Drive Hugging Face transformers with the same loads as :mod:`bench.drive`, from the same weights, and print the results as JSON.

One request at a time, as plain ``transformers`` serves: prefill, then a cached greedy loop over ``model.forward``, which is faster than
``generate()`` and so the harder bar.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from workers.artifacts.artifact import open_artifact


def load(checkpoint: Path, dtype: str) -> LlamaForCausalLM:
    """The transformers model with the weights of a tp=1 pp=1 checkpoint of the llama architecture."""
    spec = open_artifact(checkpoint).model
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.widest_mlp,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.ropes[0].theta},
        tie_word_embeddings=spec.tied_embeddings,
    )
    config._attn_implementation = "sdpa"
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(checkpoint / "rank0.safetensors").items():
        if name.endswith("attention.qkv.weight"):
            layer = name.removeprefix("transformer.").removesuffix("attention.qkv.weight")
            for part, rows in zip("qkv", tensor.split([query, key, key]), strict=True):
                state[f"model.{layer}self_attn.{part}_proj.weight"] = rows
        else:
            state[_renamed(name)] = tensor
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = LlamaForCausalLM(config).to(kind)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing not in ([], ["lm_head.weight"]):
        raise ValueError(f"the checkpoint lacks {missing}")
    model.tie_weights()
    return model.eval()


_NAMES = {
    "transformer.vocab_embedding.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.layers.": "model.layers.",
    "attention.dense.": "self_attn.o_proj.",
    "mlp.fc.": "mlp.gate_proj.",
    "mlp.gate.": "mlp.up_proj.",
    "mlp.proj.": "mlp.down_proj.",
    "post_layernorm.": "post_attention_layernorm.",
}


def _renamed(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


@torch.inference_mode()
def decode(model: LlamaForCausalLM, prompts: list[list[int]], output: int) -> tuple[int, float]:
    """(tokens, seconds) of the decode steps after the prefill of equally long ``prompts``."""
    cache = DynamicCache(config=model.config)
    ids = model(torch.tensor(prompts), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    start = time.perf_counter()
    for _ in range(output - 1):
        ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    return (output - 1) * len(prompts), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=Path, help="JSON list of [arrival, prompt ids, output tokens]; arrivals are ignored")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.artifact, args.dtype)
    decode(model, [[50] * 16] * min(args.batch, 4), 8)  # warm-up
    if args.requests:
        requests = msgspec.json.decode(args.requests.read_bytes(), type=list[tuple[float, list[int], int]])
        start = time.perf_counter()
        for _, prompt, output in requests:
            decode(model, [prompt], output)
        tokens, seconds = sum(output for _, _, output in requests), time.perf_counter() - start
    else:
        vocab = model.config.vocab_size
        prompts = [[(7 + 31 * sequence + 17 * i) % (vocab - 64) + 32 for i in range(args.prompt)] for sequence in range(args.batch)]
        tokens, seconds = decode(model, prompts, args.output)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tok_s": tokens / seconds}), flush=True)


if __name__ == "__main__":
    main()
