"""``config.json`` of Hugging Face folders: what is understood in either spelling, and what is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import ENDOFTEXT, IM_END, tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.convert import convert
from workers.artifacts.hf import read_eos, read_model
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import LinearScaling, Llama3Scaling, Parallel

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_families(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = read_model(tiny_model(tmp_path, architecture=architecture, tied=tied))
    assert (model.architecture, model.tied_embeddings) == (architecture, tied)
    assert (model.kinds[0].attention.qkv_bias, model.kinds[0].attention.qk_norm) == (
        architecture == "qwen2",
        "head" if architecture == "qwen3" else None,
    )
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.rms_norm_eps) == (6, 3, 8, 1e-5)


@pytest.mark.parametrize("spelling", ["old", "older", "new"])
def test_llama3_rope_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    if spelling == "new":
        edit(folder, rope_theta="absent", rope_scaling="absent", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    else:
        edit(folder, rope_theta=5e5, rope_scaling={"rope_type" if spelling == "old" else "type": "llama3", **LLAMA3})
    model = read_model(folder)
    assert model.ropes[0].theta == 5e5
    assert model.ropes[0].scaling == Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=256)


def test_what_transformers_itself_saves_means_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_model(tmp_path / "a", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert read_model(tmp_path / "b") == read_model(folder)


def test_linear_rope(tmp_path: Path) -> None:
    folder = edit(tiny_model(tmp_path), rope_scaling={"type": "linear", "factor": 2.0})
    assert read_model(folder).ropes[0].scaling == LinearScaling(factor=2.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"num_local_experts": 8}, "model_type 'llama' has no experts: num_local_experts is 8"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "model_type 'deepseek_v3' is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9}, "cannot take 9 experts of 8"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"hidden_act": "xielu"}, "activation 'xielu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantized with 'aqlm'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "rope scaling 'spiral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "lacks long_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0]}}, "long_factor: 1 values, not 4"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, "lack full_attention"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 values"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 values"),
        ({"quantization_config": {"quant_method": "quark"}, "model_type": "qwen3"}, "quantized with 'quark'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized with 'MLX'"),
        ({"quantization_config": {"bits": 4}}, "quantized with 'unnamed'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification does not generate text"),
        ({"architectures": ["Qwen2ForRewardModel"], "model_type": "qwen2"}, "Qwen2ForRewardModel does not generate text"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_attention_heads": 7}, "7 query heads cannot share 3"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=named):
        open_artifact(edit(tiny_model(tmp_path), **changes))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}, "vision_config": {}}, "its text model is 'llama4_text'"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}, "vision_config": {}}, "its text model is 'mistral4'"),
        ({"model_type": "idefics3", "text_config": {"model_type": "llama"}}, "its text model is 'llama'"),
        ({"model_type": "qwen2_5_vl", "hidden_size": 8, "vision_config": {}}, "it takes more than text"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "it takes more than text"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}, "vision_config": {}}, "its text model is 'qwen2'"),
    ],
)
def test_multimodal_models_are_named(config: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"model_type '{config['model_type']}' is a multimodal model") as caught:
        open_artifact(tmp_path)
    assert text in caught.value.why and "known: llama" in caught.value.why


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq (4 bits, groups of 128)"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq (4 bits, groups of 32)"),
        ("quant_config.json", {"quant_method": "awq"}, "awq (4 bits, groups of 128)"),
    ],
)
def test_quantization_that_stands_beside_the_config_is_seen(name: str, content: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tiny_model(tmp_path) / name).write_text(json.dumps(content))
    assert open_artifact(tmp_path).dequantized == words


def test_what_only_tensorrt_llm_reads_is_left_to_it(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}))
    artifact = open_artifact(tmp_path)
    assert artifact.foreign and artifact.quant.quant_algo == "NVFP4"
    with pytest.raises(ArtifactError, match="quantized with NVFP4: only TensorRT-LLM reads these weights"):
        open_source(artifact)
    path.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    rewrite(tmp_path, lambda weights: weights | {"model.layers.0.self_attn.k_proj.k_scale": np.ones(1, np.float32)})
    open_source(open_artifact(tmp_path))
    path.unlink()
    edit(tmp_path, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert open_artifact(tmp_path).quant.quant_algo == "NVFP4"


@pytest.mark.parametrize("part", ["qweight", "weight_scale", "weight_packed", "SCB"])
def test_weights_whose_names_say_that_they_are_quantized(part: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, layers=1)
    rewrite(folder, lambda weights: weights | {f"model.layers.0.mlp.up_proj.{part}": np.zeros(3, np.int8)})
    with pytest.raises(ArtifactError, match=f"its weights are quantized: it holds .*{part}"):
        open_source(open_artifact(folder))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    path = str(folder / "model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def bare(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("model."): values for name, values in weights.items() if name != "lm_head.weight"}


def head_of_its_own(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    return weights | {"lm_head.weight": head}


def only_the_head(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"lm_head.weight" if "embed_tokens" in name else name: values for name, values in weights.items()}


@pytest.mark.parametrize(
    "change", [bare, head_of_its_own, only_the_head, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}]
)
def test_a_tied_head_is_what_transformers_makes_of_it(change: Callable[[Any], Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_model(tmp_path, layers=1, tied=True)
    rewrite(folder, change)
    oracle = transformers.LlamaForCausalLM.from_pretrained(str(folder), dtype="float32").state_dict()
    artifact = open_artifact(folder)
    source = open_source(artifact)
    for name, tensor in whole_tensors(artifact.model).items():
        assert np.array_equal(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values, oracle[name].numpy()), name
    assert artifact.model.tied_embeddings == (change is not head_of_its_own)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (bare, "is a model without a head, as embedding models are"),
        (lambda weights: {name: values for name, values in weights.items() if name != "lm_head.weight"}, "lacks the model's head"),
    ],
)
def test_a_model_without_a_head_says_so(change: Callable[[Any], Any], what: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, layers=1, tied=False)
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=what) as caught:
        open_source(open_artifact(folder))
    assert "cannot generate text" in caught.value.hint


def test_nan_and_infinity_are_read_as_pythons_json_reads_them(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    expected = open_artifact(folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("{", '{"a": NaN, "b": [Infinity, -Infinity], "c": {"d": NaN},', 1))
    assert open_artifact(folder) == expected


def test_windows_of_layers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, architecture="mistral", max_position=512)
    assert read_model(edit(folder, sliding_window=128)).windows == (128,)
    for unbounded in (None, 512):
        assert read_model(edit(folder, sliding_window=unbounded)).windows == (None,)
    assert read_model(edit(folder, sliding_window=128)).max_position == 512
    qwen = tiny_model(tmp_path / "q", architecture="qwen2", max_position=512)
    assert read_model(edit(qwen, sliding_window=128, max_window_layers=1)).windows == (None,), "the switch is off"
    sliding = read_model(edit(qwen, sliding_window=128, max_window_layers=1, use_sliding_window=True))
    assert [sliding.layer(layer).attention.window for layer in range(4)] == [None, 128, 128, 128]


def test_a_checkpoint_of_a_sliding_model_has_the_length_of_its_window(tmp_path: Path) -> None:
    folder = edit(tiny_model(tmp_path / "m", architecture="mistral", max_position=512), sliding_window=128)
    convert(folder, tmp_path / "checkpoint", parallel=Parallel())
    found = open_artifact(tmp_path / "checkpoint").model
    assert (found.max_position, found.windows) == (128, (None,))


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
    ],
)
def test_positions_under_a_scaling(scaling: dict[str, Any], positions: int, tmp_path: Path) -> None:
    """YaRN stretches its original context. Dynamic scaling begins beyond the model's positions, so that it is none up to there."""
    model = read_model(edit(tiny_model(tmp_path, max_position=512), rope_scaling=scaling))
    assert model.max_position == positions
    assert (model.ropes[0].scaling is None) == (scaling["rope_type"] == "dynamic")


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert read_eos(folder) == (IM_END, ENDOFTEXT)
    (folder / "generation_config.json").unlink()
    assert read_eos(folder) == (IM_END,)


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    folder = edit(tiny_model(tmp_path), num_hidden_layers=5)
    with pytest.raises(ArtifactError, match=r"lacks the tensor model\.layers\.4"):
        open_source(open_artifact(folder))
    with pytest.raises(ArtifactError, match=r"does not have: model\.layers\.3"):
        open_source(open_artifact(edit(folder, num_hidden_layers=3)))
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight has shape \[320, 48\].*\[321, 48\]"):
        open_source(open_artifact(edit(folder, num_hidden_layers=4, vocab_size=321)))


def test_pickles_and_paths_outside_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, files=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../elsewhere.safetensors"}}))
    with pytest.raises(ArtifactError, match="points outside the folder"):
        open_artifact(folder)
    index.unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ArtifactError, match=r"pickled weights \(pytorch_model\.bin\)"):
        open_artifact(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ArtifactError, match="holds no weights"):
        open_artifact(folder)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model"):
        open_artifact(tmp_path / "nothing")
    for damaged in ("{", "[" * 100_000, "[]", "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ArtifactError, match=r"does not make sense|is a Git LFS pointer"):
            open_artifact(tmp_path)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [({"torch_dtype": "bfloat16"}, "bf16"), ({"dtype": "float16"}, "fp16"), ({}, "fp32"), ({"dtype": "float8_e4m3fn"}, "fp32")],
)
def test_without_weights_the_number_format_is_the_one_that_is_declared(keys: dict[str, str], dtype: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")} | keys
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    assert open_artifact(folder, weights_optional=True).dtype == dtype
