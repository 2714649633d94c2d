"""Which file holds which tensor: the index over stale copies, shards without an index, and what is missing by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.inspect import inspect_path
from workers.artifacts.weight_map import INDEX
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    artifact = open_artifact(folder)
    source = open_source(artifact)
    tensors = whole_tensors(artifact.model).values()
    return {tensor.name: np.array(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values) for tensor in tensors}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def add(path: Path, **tensors: np.ndarray) -> None:
    """Put more tensors into a file."""
    save_file(load_file(str(path)) | tensors, str(path), metadata={"format": "pt"})


def change_index(folder: Path, **entries: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= entries
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", tied=False, layers=2, files=3)


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, np.ndarray]:
    return weights_of(tiny_model(tmp_path / "single", tied=False, layers=2))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_the_index_wins_over_stale_copies(name: str, folder: Path, expected: dict[str, np.ndarray]) -> None:
    right = json.loads((folder / INDEX).read_text())["weight_map"][name]
    for shard in folder.glob("model-*.safetensors"):
        if shard.name != right:
            add(shard, **{name: np.full_like(expected[name], 9.0)})
    assert same(weights_of(folder), expected)
    assert inspect_path(folder, verify_files=True).runs


def test_entries_that_nobody_asks_for_may_be_stale(folder: Path, expected: dict[str, np.ndarray]) -> None:
    change_index(
        folder, **{"model.layers.7.mlp.up_proj.weight": "model-00004-of-00004.safetensors", "gone": "model-00001-of-00003.safetensors"}
    )
    assert same(weights_of(folder), expected)


def test_a_tensor_that_lies_elsewhere_than_the_index_says_is_found(folder: Path, expected: dict[str, np.ndarray]) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index["lm_head.weight"])
    change_index(folder, **{"lm_head.weight": other})
    assert same(weights_of(folder), expected)


@pytest.mark.parametrize(
    "rename", [lambda name: name, lambda name: f"weights-{name[6:11]}.safetensors", lambda name: name.replace("model", "pytorch_model")]
)
def test_shards_without_an_index_are_found(rename: Callable[[str], str], folder: Path, expected: dict[str, np.ndarray]) -> None:
    (folder / INDEX).unlink()
    for shard in list(folder.glob("*.safetensors")):
        shard.rename(folder / rename(shard.name))
    save_file({"x": np.zeros(3, np.float32)}, str(folder / "consolidated.safetensors"))
    save_file({"x": np.zeros(3, np.float32)}, str(folder / "adapter_model.safetensors"))
    assert same(weights_of(folder), expected)


def test_a_leftover_index_does_not_hide_the_single_file(folder: Path, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (tmp_path / "single" / "model.safetensors").rename(folder / "model.safetensors")
    assert same(weights_of(folder), expected)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("how", ["gone", "broken link", "pointer"])
def test_a_missing_shard_is_named(indexed: bool, how: str, folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    if how == "broken link":
        os.symlink("../../blobs/none", shard)
    if how == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    if not indexed:
        (folder / INDEX).unlink()
    named = "is a Git LFS pointer" if how == "pointer" else "is missing|cannot be read"
    with pytest.raises(ArtifactError, match=rf"model-00002-of-00003\.safetensors ({named})"):
        inspect_path(folder)


def test_a_download_that_did_not_finish_is_named(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.incomplete").write_bytes(b"")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is missing") as caught:
        inspect_path(folder)
    assert "did not finish" in caught.value.hint


def test_two_files_with_one_tensor_and_no_index_are_refused(folder: Path) -> None:
    (folder / INDEX).unlink()
    held = next(iter(load_file(str(folder / "model-00001-of-00003.safetensors"))))
    add(folder / "model-00002-of-00003.safetensors", **{held: np.zeros(1, np.float32)})
    with pytest.raises(ArtifactError, match=rf"00001-of-00003.* and .*00002-of-00003.* both hold {held}"):
        open_source(open_artifact(folder))


def test_a_header_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, layers=1)
    for value in ("[" * 100_000, '{"a":' * 100_000, '{"x": {"dtype": "F32", "shape": ' + "[" * 100_000):
        header = value.encode()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ArtifactError, match=r"model\.safetensors is not a safetensors file"):
            open_artifact(folder)
