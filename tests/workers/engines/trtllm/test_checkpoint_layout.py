"""Our converter's checkpoints against the layout that TensorRT-LLM publishes: names, shapes, splits and config keys.

The expected shards are cut here from the Hugging Face tensors by the published rules alone, in numpy; nothing of `workers.layout.sharding`
helps. Then each folder is read back and must give the source's logits to the bit.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.trtllm_host import FAKES, even_model
from workers.artifacts.artifact import open_artifact
from workers.artifacts.convert import convert
from workers.protocol.specs import Parallel, PortableSpec

FORMAT = json.loads((FAKES.parent / "contracts" / "tensorrt_llm_api.json").read_text())["checkpoint_format"]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
LAYERS, HEADS, HEAD_DIM, VOCAB = 3, 8, 8, 322
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[(4, True), (2, False)], ids=["kv=4 tied", "kv=2 own head"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kv=2: fewer key/value heads than tp=4 has ranks."""
    kv_heads, tied = request.param
    return even_model(tmp_path_factory.mktemp("hf"), kv_heads=kv_heads, tied=tied)


def part(values: np.ndarray, parts: int, index: int, axis: int = 0) -> np.ndarray:
    return np.split(values, parts, axis)[index]


def heads(values: np.ndarray, tp: int, rank: int) -> np.ndarray:
    """Rows of k or v for a rank; with fewer heads than ranks each head goes to several."""
    count = len(values) // HEAD_DIM
    copies = max(1, tp // count)
    return part(np.repeat(values.reshape(count, HEAD_DIM, -1), copies, 0), tp, rank).reshape(-1, values.shape[-1])


def padded(values: np.ndarray, tp: int) -> np.ndarray:
    return np.pad(values, ((0, -len(values) % tp), (0, 0)))


def expected(weights: Weights, tp: int, pp: int, rank: int) -> Weights:
    """A rank's file by the published rules: rank = pp_rank * tp + tp_rank; the first (layers mod pp) stages hold one layer more; layer
    numbers restart in each stage; mlp.fc is gate_proj and mlp.gate is up_proj."""
    stage, t = divmod(rank, tp)
    layers = np.array_split(np.arange(LAYERS), pp)[stage]
    embedding = weights["model.embed_tokens.weight"]
    found: Weights = {}
    if stage == 0:
        found["transformer.vocab_embedding.weight"] = part(padded(embedding, tp), tp, t)
    for local, layer in enumerate(layers):
        hf = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items() if f".layers.{layer}." in name}
        to = f"transformer.layers.{local}."
        q, k, v = (hf[f"self_attn.{x}_proj.weight"] for x in "qkv")
        found[to + "input_layernorm.weight"] = hf["input_layernorm.weight"]
        found[to + "attention.qkv.weight"] = np.concatenate([part(q, tp, t), heads(k, tp, t), heads(v, tp, t)])
        found[to + "attention.dense.weight"] = part(hf["self_attn.o_proj.weight"], tp, t, 1)
        found[to + "post_layernorm.weight"] = hf["post_attention_layernorm.weight"]
        found[to + "mlp.fc.weight"] = part(hf["mlp.gate_proj.weight"], tp, t)
        found[to + "mlp.gate.weight"] = part(hf["mlp.up_proj.weight"], tp, t)
        found[to + "mlp.proj.weight"] = part(hf["mlp.down_proj.weight"], tp, t, 1)
    if stage == pp - 1:
        found["transformer.ln_f.weight"] = weights["model.norm.weight"]
        found["lm_head.weight"] = part(padded(weights.get("lm_head.weight", embedding), tp), tp, t)
    return found


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_names_shapes_and_splits(source: Path, tp: int, pp: int, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "ck", parallel=Parallel(tp=tp, pp=pp), for_trtllm=True)
    weights = load_file(source / "model.safetensors")
    templates = {entry["name"] for entry in FORMAT["llama_tensors"]}
    seen: set[str] = set()
    assert sorted(path.name for path in target.glob("rank*")) == [f"rank{rank}.safetensors" for rank in range(tp * pp)]
    for rank in range(tp * pp):
        stored, wanted = load_file(target / f"rank{rank}.safetensors"), expected(weights, tp, pp, rank)
        assert stored.keys() == wanted.keys(), rank
        for name, values in wanted.items():
            assert np.array_equal(stored[name], values), f"rank {rank}: {name}"
        seen |= {re.sub(r"layers\.\d+\.", "layers.{l}.", name) for name in stored}
    # Everything published but what belongs to a quantized KV cache, and nothing else.
    assert seen == {name for name in templates if "kv_cache_scaling_factor" not in name}


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_config_keys(source: Path, tp: int, pp: int, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "ck", parallel=Parallel(tp=tp, pp=pp), dtype="bf16", for_trtllm=True)
    config, keys = json.loads((target / "config.json").read_text()), FORMAT["config_keys"]
    assert config.keys() >= {*keys["required"], *keys["optional"], "mapping", "quantization", *keys["embedding"]}
    assert config["mapping"] == {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    assert config["quantization"].keys() <= keys["quantization"].keys()
    original = json.loads((source / "config.json").read_text())
    same = {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "hidden_act",
    }
    assert {name: config[name] for name in same} == {name: original[name] for name in same}
    assert (config["architecture"], config["dtype"], config["norm_epsilon"]) == ("LlamaForCausalLM", "bfloat16", original["rms_norm_eps"])
    # Vocabulary rows are cut, as the embedding's shards are.
    assert (config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (tp > 1, 0)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_read_back_gives_the_same_logits(source: Path, tp: int, pp: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.reference.engine import request, serve
    from workers.engines.portable import PortableEngine, build
    from workers.protocol.messages import SamplingParams
    from workers.protocol.specs import ReplicaSpec

    assert torch
    target = convert(source, tmp_path / "ck", parallel=Parallel(tp=tp, pp=pp), for_trtllm=True)
    back = convert(target, tmp_path / "back", parallel=Parallel())
    assert open_artifact(back).model == open_artifact(source).model
    asked = request([5, 80, 33, 120, 7], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=20, prompt_logprobs=20))

    def answer(folder: Path) -> object:
        engine = build(ReplicaSpec(name="r", model="m", artifact=str(folder), engine=PortableSpec(kv_tokens=512, max_batch_size=4)), None)
        assert isinstance(engine, PortableEngine)
        return serve(engine, [asked])

    assert answer(back) == answer(source)  # tokens and the 20 best log-probabilities at each position, to the bit
