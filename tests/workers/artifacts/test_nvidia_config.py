"""Checkpoints of TensorRT-LLM's own converters: loaded whole and by rank, converted; what is not computed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.nvidia_checkpoint import nvidia_checkpoint
from tests.support.tiny_models import ENDOFTEXT, IM_END, tiny_model, tiny_tokenizer
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.convert import convert
from workers.artifacts.inspect import inspect_path
from workers.layout.declaration import EMBEDDING, HEAD
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import Llama3Scaling, Parallel

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def check_weights(folder: Path, original: Path) -> None:
    artifact = open_artifact(folder)
    weights, source = load_file(str(original / "model.safetensors")), open_source(artifact)
    for name, tensor in whole_tensors(artifact.model).items():
        expected = weights[EMBEDDING] if name == HEAD and HEAD not in weights else weights[name]
        for span in (Span(0, tensor.shape[tensor.axis]), Span(3, 7)):
            wanted = expected[span.start : span.stop] if tensor.axis == 0 else expected[:, span.start : span.stop]
            assert np.array_equal(source.read(tensor, span).values, wanted), name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("tp", "pp", "embedding"), [(1, 1, "whole"), (2, 1, "whole"), (2, 3, "rows"), (4, 1, "columns")])
def test_weights_are_those_of_the_original(architecture: str, tp: int, pp: int, embedding: str, tmp_path: Path) -> None:
    shape = {"heads": 4, "kv_heads": 2, "layers": 4, "ffn": 32, "hidden": 32, "vocab": 321}
    original = tiny_model(tmp_path / "hf", architecture=architecture, tied=tp == 1, rope_scaling=LLAMA3, **shape)
    folder = nvidia_checkpoint(original, tmp_path / "trt", tp=tp, pp=pp, embedding=embedding)
    artifact, expected = open_artifact(folder), open_artifact(original).model
    assert (artifact.kind, artifact.parallel, artifact.dtype, artifact.own) == ("checkpoint", Parallel(tp=tp, pp=pp), "fp32", False)
    assert artifact.model.ropes[0].scaling == expected.ropes[0].scaling
    assert {field for field in expected.__struct_fields__ if getattr(expected, field) != getattr(artifact.model, field)} <= {
        "tied_embeddings"
    }
    check_weights(folder, original)
    assert inspect_path(folder).runs


def test_each_rank_gets_what_it_gets_of_the_original(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from workers.runner.weights import load_shards

    original = tiny_model(tmp_path / "hf", heads=4, kv_heads=2, layers=2, tied=False)
    layout = Parallel(tp=2, pp=2)
    artifact, whole = open_artifact(nvidia_checkpoint(original, tmp_path / "trt", tp=2, pp=2)), open_artifact(original)
    for rank in range(4):
        ours, expected = dict(load_shards(artifact, layout, rank, "fp32")), dict(load_shards(whole, layout, rank, "fp32"))
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_tied_head_that_is_not_stored_is_the_embedding(tmp_path: Path) -> None:
    original = tiny_model(tmp_path / "hf", heads=4, kv_heads=2, layers=1)
    folder = nvidia_checkpoint(original, tmp_path / "trt", tp=2, head=False)
    assert open_artifact(folder).model.tied_embeddings
    check_weights(folder, original)


def test_conversion_to_another_layout(tmp_path: Path) -> None:
    original = tiny_model(tmp_path / "hf", heads=4, kv_heads=2, layers=2, tied=False)
    folder = tiny_tokenizer(nvidia_checkpoint(original, tmp_path / "trt", tp=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, ENDOFTEXT]}))
    made = open_artifact(convert(folder, tmp_path / "made", parallel=Parallel(pp=2)))
    assert made.own and made.eos_ids == (IM_END, ENDOFTEXT) and made.tokenizer_dir is not None
    check_weights(tmp_path / "made", original)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "GPTForCausalLM"}, "architecture 'GPTForCausalLM' is not supported"),
        ({"architecture": "LlamaForSequenceClassification"}, "architecture 'LlamaForSequenceClassification' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned_absolute"),
        ({"position_embedding_type": None}, "position_embedding_type"),
        ({"attn_bias": True}, "attn_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"rotary_embedding_dim": 4}, "rotary_embedding_dim=4"),
        ({"moe": {"num_experts": 8, "top_k": 2}}, "mixture of experts.*num_experts is 8"),
        ({"mapping": {"world_size": 4, "tp_size": 2, "pp_size": 1, "cp_size": 2}}, "cp_size=2"),
        ({"rotary_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"dtype": "float64"}, "dtype=float64"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = nvidia_checkpoint(tiny_model(tmp_path / "hf", layers=1), tmp_path / "trt")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=named):
        open_artifact(folder)


def test_absent_keys_mean_what_tensorrt_llm_makes_of_them(tmp_path: Path) -> None:
    original = tiny_model(tmp_path / "hf", layers=1, hidden=32, heads=4, kv_heads=4, head_dim=8, ffn=128, rope_theta=10000.0)
    folder = nvidia_checkpoint(original, tmp_path / "trt")
    path = folder / "config.json"
    needed = ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    config = json.loads(path.read_text())
    config = {key: config[key] for key in (*needed, "max_position_embeddings", "position_embedding_type")}
    path.write_text(json.dumps(config | {"rotary_scaling": {"type": "llama3"}}))
    check_weights(folder, original)
    assert open_artifact(folder).model.ropes[0].scaling == Llama3Scaling(factor=8.0)


@pytest.mark.parametrize("algo", ["FP8", "W8A16", "W4A16_AWQ", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_quantized_ones_are_left_to_tensorrt_llm(algo: str, tmp_path: Path) -> None:
    folder = nvidia_checkpoint(tiny_model(tmp_path / "hf", layers=1), tmp_path / "trt")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["quant_algo"] = algo
    path.write_text(json.dumps(config))
    found = inspect_path(folder)
    assert not found.runs and found.reason == f"quantized with {algo}: only TensorRT-LLM reads these weights"
    with pytest.raises(ArtifactError, match=f"quantized with {algo}"):
        open_source(open_artifact(folder))


def test_files_that_are_missing_or_of_another_layout_are_named(tmp_path: Path) -> None:
    folder = nvidia_checkpoint(tiny_model(tmp_path / "hf", heads=4, kv_heads=2, layers=1), tmp_path / "trt", tp=2)
    path = folder / "rank1.safetensors"
    save_file(load_file(str(path)) | {"transformer.layers.0.attention.qkv.weight": np.zeros((3, 3), np.float32)}, str(path))
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors: transformer\.layers\.0\.attention\.qkv\.weight is F32 \[3, 3\]"):
        inspect_path(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors is missing: tp=2 pp=1 needs it"):
        open_artifact(folder)
