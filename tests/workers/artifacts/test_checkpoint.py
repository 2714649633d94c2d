"""Checkpoint folders and safetensors files: readable by others, verified before they are believed, refused when they are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.support.examples import examples
from tests.support.tiny_models import ENDOFTEXT, IM_END, tiny_model
from workers.artifacts.artifact import open_artifact
from workers.artifacts.checkpoint import open_rank, read_checkpoint
from workers.artifacts.convert import convert
from workers.artifacts.inspect import inspect_path
from workers.artifacts.number_formats import STORAGE, cast
from workers.artifacts.safetensors_file import SafetensorsFile, SafetensorsWriter, hash_file
from workers.layout.sharding import shard_tensors
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import Parallel

torch = pytest.importorskip("torch")
TP2_PP2 = Parallel(tp=2, pp=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return convert(tiny_model(folder / "hf"), folder / "ck", parallel=TP2_PP2, dtype="bf16")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "ck"))


def test_bf16_rounding_is_torchs() -> None:
    # Every sign, exponent and top mantissa bit, just below, at and just above each tie; infinities and NaNs are among them.
    high, low = np.meshgrid(np.arange(1 << 16, dtype=np.uint32) << 16, np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32))
    array = (high | low).reshape(-1).view(np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    bits = cast(array, "fp32", "bf16")
    ours = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    # NaN payloads may differ; that it is a NaN may not.
    assert torch.equal(torch.isnan(ours), torch.isnan(expected))
    finite = ~torch.isnan(ours)
    assert torch.equal(ours[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert np.array_equal(cast(bits, "bf16", "fp32"), ours.float().numpy(), equal_nan=True)


def test_weights_too_large_for_fp16_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"do not fit fp16.*70000"):
        cast(np.array([1.0, -70000.0], np.float32), "fp32", "fp16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_written_files_are_read_by_the_safetensors_library(dtype: str, tmp_path: Path) -> None:
    values = cast(np.arange(15, dtype=np.float32).reshape(3, 5), "fp32", dtype)  # type: ignore[arg-type]
    shapes = {"odd.name": ((3, 5), dtype), "b": ((1,), dtype)}
    with SafetensorsWriter(tmp_path / "x", shapes, {"rank": "0"}) as writer:  # type: ignore[arg-type]
        writer.write("odd.name", values)
        writer.write("b", np.zeros(1, STORAGE[dtype]))  # type: ignore[index]
        record = writer.finish()
    assert record == hash_file(tmp_path / "x")
    with safe_open(str(tmp_path / "x"), "pt") as file:
        assert torch.equal(file.get_tensor("odd.name").float(), torch.arange(15.0).reshape(3, 5))
        assert file.metadata() == {"rank": "0"}
    assert np.array_equal(SafetensorsFile(tmp_path / "x").view("odd.name")[0], values)


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + np.arange(4, dtype="<f4").tobytes())
    values, dtype = SafetensorsFile(tmp_path / "x").view("x")
    assert np.array_equal(cast(cast(values, dtype, "bf16"), "bf16", "fp32"), [[0, 1], [2, 3]])


def test_writer_insists_on_what_was_announced(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", {"a": ((2,), "fp32")}, {}) as writer:
        with pytest.raises(ValueError, match="never written"):
            writer.finish()
        with pytest.raises(ValueError, match="expected"):
            writer.write("a", np.zeros(3, np.float32))


@settings(max_examples=examples(60), deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_safetensors_are_refused(whole: Path, tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    data = (whole / "rank0.safetensors").read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ArtifactError):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32"},
    ],
)
def test_headers_that_lie_are_refused(entry: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError):
        SafetensorsFile(tmp_path / "x")


def test_config_speaks_tensorrt_llm(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"
    assert (config["dtype"], config["logits_dtype"], config["hidden_act"]) == ("bfloat16", "float32", "silu")
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert config["quantization"]["quant_algo"] is None
    assert (config["num_key_value_heads"], config["head_size"], config["rotary_base"]) == (3, 8, 10000.0)
    assert config["trireme"]["heads"] == [[[0, 4], [0, 2]], [[4, 6], [2, 3]]]


def test_artifact_of_a_checkpoint(whole: Path) -> None:
    artifact = open_artifact(whole)
    assert (artifact.kind, artifact.dtype, artifact.parallel) == ("checkpoint", "bf16", TP2_PP2)
    assert artifact.eos_ids == (IM_END, ENDOFTEXT)
    assert artifact.tokenizer_dir == whole
    assert artifact.model == open_artifact(whole.parent / "hf").model


def test_every_rank_file_has_exactly_its_shard(whole: Path) -> None:
    checkpoint = read_checkpoint(whole)
    for rank in range(4):
        wanted = {tensor.name: list(tensor.shape) for tensor in shard_tensors(checkpoint.facts.model, TP2_PP2, rank)}
        with safe_open(str(whole / f"rank{rank}.safetensors"), "pt") as file:
            assert {name: file.get_slice(name).get_shape() for name in file.keys()} == wanted  # noqa: SIM118


def test_a_flipped_bit_is_found_with_both_hashes(folder: Path) -> None:
    path = folder / "rank2.safetensors"
    expected = hash_file(path).sha256
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        inspect_path(folder, verify_files=True)
    assert caught.value.what == f"{path} is damaged"
    assert caught.value.why == f"expected sha256 {expected}, got {hash_file(path).sha256}"


def test_missing_short_and_unlisted_files_are_named(folder: Path) -> None:
    path = folder / "rank3.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"rank3.*expected {len(data)} bytes, got {len(data) - 1}"):
        open_artifact(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"rank3\.safetensors is missing"):
        open_artifact(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["rank3.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"does not list rank3\.safetensors"):
        open_artifact(folder)


def test_swapped_ranks_are_refused(folder: Path) -> None:
    for old, new in (("rank0", "swap"), ("rank2", "rank0"), ("swap", "rank2")):
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    with pytest.raises(ArtifactError, match=r"rank0\.safetensors"):
        inspect_path(folder, verify_files=True)


def _rewrite_config(folder: Path, change: dict[str, object]) -> None:
    """Change ``config.json`` as someone would who also knows about the manifest."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = json.loads((folder / "manifest.json").read_text())
    record = hash_file(path)
    manifest["files"]["config.json"] = {"sha256": record.sha256, "bytes": record.bytes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_edited_config_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    with pytest.raises(ArtifactError, match=r"config\.json is damaged: expected sha256"):
        open_artifact(folder)
    path.write_text(path.read_text().replace("20000.0", "10000.0"))
    open_artifact(folder)
    _rewrite_config(folder, {"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}})
    with pytest.raises(ArtifactError, match=r"contradicts itself: mapping is .*'tp_size': 1"):
        open_artifact(folder)


def test_checkpoints_of_other_converters_and_engines_are_refused(folder: Path) -> None:
    _rewrite_config(folder, {"trireme": None})
    with pytest.raises(ArtifactError, match="another converter wrote it"):
        open_artifact(folder)
    (folder / "config.json").write_text(json.dumps({"version": "1.2.0", "pretrained_config": {}, "build_config": {}}))
    with pytest.raises(ArtifactError, match="holds a TensorRT-LLM engine"):
        open_artifact(folder)


def test_a_conversion_that_did_not_finish_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json: the conversion did not finish"):
        open_artifact(folder)


def test_a_file_with_other_tensors_is_refused(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    shutil.copy(folder / "rank2.safetensors", folder / "rank0.safetensors")
    with pytest.raises(ArtifactError, match=r"rank0\.safetensors (lacks|holds an unknown tensor)"):
        open_rank(checkpoint, 0)
