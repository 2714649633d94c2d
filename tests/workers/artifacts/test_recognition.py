"""What a folder is that holds no model: named, with what to give instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.artifacts.artifact import open_artifact, open_source
from workers.protocol.errors import ArtifactError

CACHE = "is a folder of the Hugging Face cache"
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})


def lay(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(ADAPTER if name.endswith("adapter_config.json") else "{}")
    return root


@pytest.mark.parametrize(
    ("names", "what", "hint"),
    [
        ((), "holds no model: it has no config.json", "give a Hugging Face folder"),
        (("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter, not a model: it changes .* 'org/base'", "merge it"),
        (("models--o--n/snapshots/abc/config.json", "models--o--n/refs/main"), CACHE, "{root}/models--o--n/snapshots/abc"),
        (("hub/models--o--n/snapshots/abc/config.json",), CACHE, "{root}/hub/models--o--n/snapshots/abc"),
        (("snapshots/abc/config.json", "blobs/x", "refs/main"), CACHE, "{root}/snapshots/abc"),
        (("a.Q8_0.gguf", "b.Q4_1.gguf"), "is a folder of GGUF files", "give {root}/a.Q8_0.gguf or {root}/b.Q4_1.gguf"),
        (("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"), "is a folder of GGUF files", "give {root}/a-00001-of-00002.gguf"),
        (("a.gguf", "mmproj-a.gguf"), "is a folder of GGUF files", "give {root}/a.gguf"),
        (("rank0.engine", "rank1.engine"), "holds TensorRT engines", "give the model"),
        (("model.onnx",), "holds an ONNX model", "give the model"),
        (("openvino_model.xml", "openvino_model.bin"), "holds an OpenVINO model", "give the model"),
        (("params.json", "consolidated.safetensors"), "in its maker's own form", "download the Hugging Face form"),
        (("consolidated.00.pth", "params.json"), "in its maker's own form", "download the Hugging Face form"),
        (("model.safetensors",), "holds weights without their config.json", "copy config.json"),
        (("pytorch_model.bin",), r"holds pickled weights \(pytorch_model.bin\)", "save the model as safetensors"),
        (("run-1/config.json", "run-2/config.json"), "holds models in folders of its own", "{root}/run-1 or {root}/run-2"),
        (("model_index.json", "unet/config.json"), "is a pipeline of diffusers", "give a Hugging Face folder"),
        (("tokenizer.json",), "holds a tokenizer without a model", "give a Hugging Face folder"),
    ],
)  # fmt: skip
def test_a_folder_without_a_model_is_named(names: tuple[str, ...], what: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=what) as caught:
        open_artifact(lay(tmp_path, *names))
    assert hint.format(root=tmp_path) in caught.value.hint


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ((), "holds no weights"),
        (("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter, not a model"),
        (("m.Q8_0.gguf",), "holds its weights as GGUF"),
        (("consolidated.safetensors",), "in its maker's own form"),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "holds pickled weights"),
        (("tf_model.h5",), "holds TensorFlow weights"),
        (("flax_model.msgpack",), "holds Flax weights"),
        (("onnx/model.onnx", "model.onnx"), "holds an ONNX model"),
    ],
)
def test_a_folder_without_weights_is_named(names: tuple[str, ...], what: str, tmp_path: Path) -> None:
    folder = lay(tiny_model(tmp_path, layers=1), *names)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=what):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"pretrained_config": {}, "build_config": {}}, "holds a TensorRT-LLM engine"),
        ({"_class_name": "UNet2DConditionModel"}, "is of diffusers"),
        ({"hello": 1}, "does not say what model it is"),
    ],
)
def test_a_config_of_something_else_is_named(config: dict[str, object], what: str, tmp_path: Path) -> None:
    (tiny_tokenizer(tmp_path) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=what):
        open_artifact(tmp_path)


def test_an_adapter_that_is_not_merged_is_named(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    path = str(tiny_model(tmp_path, layers=1) / "model.safetensors")
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 48), np.float32)}, path)
    with pytest.raises(ArtifactError, match="holds a LoRA adapter that is not merged"):
        open_source(open_artifact(tmp_path))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "is one file of a model"),
        ("config.json", "is one file of a model"),
        ("pytorch_model.bin", "holds pickled weights"),
        ("rank0.engine", "holds TensorRT engines"),
        ("model.onnx", "holds an ONNX model"),
        ("notes.txt", "is not a GGUF file"),
    ],
)
def test_a_file_that_is_no_gguf_is_named(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("something of no use")
    with pytest.raises(ArtifactError, match=what):
        open_artifact(tmp_path / name)


def test_a_file_of_no_tensors_is_named(tmp_path: Path) -> None:
    (tiny_model(tmp_path, layers=1) / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match=r"model\.safetensors holds no tensors"):
        open_artifact(tmp_path)


def test_an_incomplete_download_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/none")
    with pytest.raises(ArtifactError, match="is an incomplete download"):
        open_artifact(tmp_path)
