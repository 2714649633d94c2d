"""GGUFs of the families: the model of the metadata and the values of every tensor are those of the Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.families import FamilyCase, write_family
from tests.support.family_gguf import family_gguf
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.gguf import GgufFile, GgufSource, read_model
from workers.artifacts.source import Block
from workers.layout.sharding import Span, whole_tensors
from workers.models.registry import FAMILIES

RMS, LAYER = {"attention.layer_norm_rms_epsilon": 1e-5}, {"attention.layer_norm_epsilon": 1e-5}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
#: (family, keys of its config, keys of the metadata).
FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", BIASES, RMS),
    ("qwen2", {}, RMS),
    ("qwen3", {"head_dim": 32}, RMS),
    (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 8.0},
        RMS | {"embedding_scale": 3.0, "residual_scale": 0.22, "attention.scale": 0.3, "logit_scale": 8.0},
    ),
    ("smollm3", {}, RMS),
    ("olmo2", {}, RMS),
    ("phi3", {"head_dim": None, "sliding_window": 40}, RMS | {"attention.sliding_window": 40}),
    (
        "phi3",
        {"head_dim": None, "partial_rotary_factor": 0.75, "sliding_window": None},
        RMS | {"attention.sliding_window": 0, "rope.dimension_count": 12},
    ),
    ("gemma", {"tie_word_embeddings": True}, RMS),
    (
        "gemma2",
        {"tie_word_embeddings": True, "sliding_window": 21, "query_pre_attn_scalar": 16} | CAPS,
        RMS | CAPS | {"attention.sliding_window": 21},
    ),
    (
        "gemma3_text",
        {
            "tie_word_embeddings": True, "sliding_window": 21, "num_hidden_layers": 7, "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        RMS | {"attention.sliding_window": 21, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    ("glm4", {}, RMS | {"rope.dimension_count": 8}),
    ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}, LAYER | {"logit_scale": 0.25}),
    (
        "cohere2",
        {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 21},
        LAYER | {"logit_scale": 0.25, "attention.sliding_window": 21},
    ),
    ("olmo", {}, LAYER),
    ("starcoder2", {"sliding_window": None, "norm_epsilon": 1e-6}, {"attention.layer_norm_epsilon": 1e-6}),
    ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}, LAYER | {"rope.dimension_count": 4}),
    ("stablelm", {"use_parallel_residual": True}, LAYER | {"rope.dimension_count": 4, "use_parallel_residual": True}),
    ("seed_oss", {"rms_norm_eps": 1e-6}, {"attention.layer_norm_rms_epsilon": 1e-6}),
    ("exaone4", {"sliding_window": 21}, RMS | {"attention.sliding_window": 21}),
    ("ernie4_5", {}, RMS),
    ("arcee", {}, RMS),
    ("nemotron", {}, LAYER | {"rope.dimension_count": 8}),
]  # fmt: skip


#: What each way of writing a family is tested with in `make test`; `make test-families` tests all.
USUAL = ("llama", "gemma3_text", "phi3", "smollm3", "cohere2")
PARAMETERS = [pytest.param(*form, marks=() if form[0] in USUAL else pytest.mark.families) for form in FORMS]


@pytest.mark.parametrize(("family", "config", "keys"), PARAMETERS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_familys_gguf_is_its_folder(family: str, config: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    folder = write_family(FamilyCase(family, family, config), tmp_path / "hf")
    form = FAMILIES[family].gguf
    assert form is not None
    file = GgufFile(family_gguf(folder, tmp_path / "model.gguf", form.architecture, keys))
    artifact = open_artifact(folder)
    model = read_model(file)
    assert model == artifact.model
    expected, found = open_source(artifact), GgufSource(file, model)
    for tensor in whole_tensors(model).values():
        size = tensor.shape[tensor.axis]
        # Whole, and the last head of queries and keys or half of the columns, as a rank reads it.
        for span in (Span(0, size), Span(size - model.head_dim, size)):
            left, right = found.read(tensor, span), expected.read(tensor, span)
            assert left.values.shape == right.values.shape, tensor.name
            _compare(tensor.name, left, right)


def _compare(name: str, found: Block, expected: Block) -> None:
    if name.endswith("norm.weight"):  # 1 was added and taken away again
        np.testing.assert_allclose(found.values, expected.values, atol=2e-7)
    else:
        np.testing.assert_array_equal(found.values, expected.values, name)


def test_every_family_with_a_gguf_form_is_tested() -> None:
    assert {family for family, _, _ in FORMS} == {name for name, family in FAMILIES.items() if family.gguf is not None}
