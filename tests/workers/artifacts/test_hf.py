"""``config.json`` of Hugging Face folders: what is understood in either spelling, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import ENDOFTEXT, IM_END, tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.hf import read_eos, read_model
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import RopeScaling

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
    assert (model.qkv_bias, model.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.rms_norm_eps) == (6, 3, 8, 1e-5)


@pytest.mark.parametrize("spelling", ["old", "older", "new"])
def test_llama3_rope_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    if spelling == "new":
        edit(folder, rope_theta="absent", rope_scaling="absent", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    else:
        edit(folder, rope_theta=5e5, rope_scaling={"rope_type" if spelling == "old" else "type": "llama3", **LLAMA3})
    model = read_model(folder)
    assert model.rope_theta == 5e5
    assert model.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=256
    )


def test_what_transformers_itself_saves_means_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_model(tmp_path / "a", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert read_model(tmp_path / "b") == read_model(folder)


def test_linear_rope(tmp_path: Path) -> None:
    folder = edit(tiny_model(tmp_path), rope_scaling={"type": "linear", "factor": 2.0})
    assert read_model(folder).rope_scaling == RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts.*num_local_experts is 8"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_attention_heads": 7}, "7 query heads cannot share 3"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=named):
        read_model(edit(tiny_model(tmp_path), **changes))


def test_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, architecture="mistral", max_position=512)
    assert read_model(folder).max_position == 512
    assert read_model(edit(folder, sliding_window=128)).max_position == 128
    qwen = tiny_model(tmp_path / "q", architecture="qwen2", max_position=512)
    assert read_model(edit(qwen, sliding_window=128)).max_position == 512
    assert read_model(edit(qwen, sliding_window=128, use_sliding_window=True)).max_position == 128


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
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ArtifactError, match=r"pickled weights \(pytorch_model\.bin\)"):
        open_artifact(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ArtifactError, match="holds no weights"):
        open_artifact(folder)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        open_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="does not make sense"):
        open_artifact(tmp_path)
