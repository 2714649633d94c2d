"""Multimodal models: the text model of a folder is served alone, under the names that transformers gives and gave its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.hf import read_model
from workers.layout.sharding import Span, whole_tensors
from workers.models.registry import file_places
from workers.protocol.errors import ArtifactError

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def wrapper(folder: Path, kind: str, text: str, vision: str) -> dict[str, np.ndarray]:
    """Write a tiny model with transformers; returns its text model's tensors by the names of a causal language model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    parts = {"text_config": {"model_type": text} | TEXT, "vision_config": {"model_type": vision} | VISION}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **parts, image_token_index=60, image_token_id=60))
    model.save_pretrained(folder)
    states = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    return {name: value.numpy() for name, value in (states | {"lm_head.weight": model.lm_head.weight.detach()}).items()}


@pytest.mark.families
@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [("gemma3", "gemma3_text", "siglip_vision_model"), ("mistral3", "mistral", "pixtral"), ("llava", "llama", "clip_vision_model")],
)
def test_the_text_model_is_read(kind: str, text: str, vision: str, tmp_path: Path) -> None:
    expected = wrapper(tmp_path, kind, text, vision)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    inner = "model.language_model." if any(name.startswith("model.language_model.") for name in saved) else "language_model.model."
    for prefix, head in (("model.language_model.", ""), ("language_model.model.", "language_model.")):
        renamed = {name.replace(inner, prefix): values for name, values in saved.items() if not name.endswith("lm_head.weight")}
        renamed |= {f"{head}lm_head.weight": values for name, values in saved.items() if name.endswith("lm_head.weight")}
        save_file(renamed, file, metadata={"format": "pt"})
        artifact = open_artifact(tmp_path)
        assert artifact.model.architecture == text and artifact.model.vocab_size == 64
        source, places = open_source(artifact), file_places(artifact.model)
        for tensor in whole_tensors(artifact.model).values():
            found = source.read(tensor, Span(0, tensor.shape[tensor.axis]))
            np.testing.assert_array_equal(found.values, expected[places[tensor.name][0]], tensor.name)


def test_what_a_config_of_gemma_3_leaves_out(tmp_path: Path) -> None:
    """The text_config of Gemma 3 4B, as it was published."""
    text: dict[str, Any] = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size, model.max_position) == (8, 4, 256, 262_208, 131_072)
    assert model.tied_embeddings and [rope.theta for rope in model.ropes] == [1e4, 1e6] and model.windows == (1024, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "gemma3_text", "hidden_size": "many"}}))
    with pytest.raises(ArtifactError, match=r"does not make sense.*hidden_size"):
        read_model(tmp_path)
