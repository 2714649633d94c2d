"""GGUF: our reader against the format's own package and against transformers' load; damaged files are refused, never trusted."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.support.tiny_models import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.gguf import GgufFile, GgufSource, read_model, stored_name
from workers.artifacts.gguf_tokenizer import end_ids, read_vocabulary, tokenizer_files
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hf"), hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2)


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf", ("F32", "F16", "Q8_0", "Q4_1"))


def test_metadata_gives_the_model_of_the_original(folder: Path, path: Path) -> None:
    from workers.artifacts import hf

    assert read_model(GgufFile(path)) == hf.read_model(folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_plain_weights_come_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf", architecture=architecture, layers=2, tied=architecture == "qwen3")
    file = GgufFile(tiny_gguf(source, tmp_path / "tiny.gguf"))
    model = read_model(file)
    weights = load_file(str(source / "model.safetensors"))
    reader = GgufSource(file, model)
    for name, tensor in whole_tensors(model).items():
        block = reader.read(tensor, Span(0, tensor.shape[tensor.axis]))
        assert np.array_equal(block.values, weights[name]), name


def test_quantized_weights_equal_the_packages_own_dequantization(path: Path) -> None:
    file = GgufFile(path)
    oracle = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(path)).tensors}
    kinds = set()
    for name, info in file.tensors.items():
        if "attn_q" in name or "attn_k" in name:
            continue  # permuted; the tests against transformers and the original weights cover them
        kinds.add(info.format.name)
        source = GgufSource(file, read_model(file))
        tensor = next(t for n, t in whole_tensors(read_model(file)).items() if stored_name(n) == name)
        assert np.array_equal(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values, oracle[name]), name
    assert kinds == {"F32", "F16", "Q8_0", "Q4_1"}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_slice_is_the_slice_of_the_whole(path: Path, data: st.DataObject) -> None:
    file = GgufFile(path)
    model = read_model(file)
    tensor = data.draw(st.sampled_from(list(whole_tensors(model).values())))
    unit = model.head_dim if "q_proj" in tensor.name or "k_proj" in tensor.name else 1
    size = tensor.shape[tensor.axis] // unit
    start = data.draw(st.integers(0, size - 1))
    span = Span(start, data.draw(st.integers(start + 1, size))).scaled(unit)
    source = GgufSource(file, model)
    whole = source.read(tensor, Span(0, tensor.shape[tensor.axis])).values
    expected = whole[span.start : span.stop] if tensor.axis == 0 else whole[:, span.start : span.stop]
    assert np.array_equal(source.read(tensor, span).values, expected)


def test_weights_equal_transformers_own_load(path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    oracle = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    file = GgufFile(path)
    model = read_model(file)
    source = GgufSource(file, model)
    for name, tensor in whole_tensors(model).items():
        ours = source.read(tensor, Span(0, tensor.shape[tensor.axis])).values
        assert np.array_equal(ours, oracle[name].numpy()), name


def test_tokenizer_files(path: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary(path, GgufFile(path).metadata)
    assert end_ids(vocabulary) == (IM_END, ENDOFTEXT)
    files = tokenizer_files(path, vocabulary)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["eos_token"], config["add_bos_token"], config["chat_template"]) == ("<|im_end|>", False, CHAT_TEMPLATE)
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [IM_END, ENDOFTEXT]}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    text = "<|im_start|>user\nhéllo  12 🎉<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 257 and ids[-1] == IM_END and IM_END not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_other_tokenizers_are_refused_by_name(path: Path) -> None:
    vocabulary = read_vocabulary(path, GgufFile(path).metadata | {"tokenizer.ggml.model": "llama"})
    with pytest.raises(ArtifactError, match="tokenizer 'llama' with pre-tokenizer 'smollm'"):
        tokenizer_files(path, vocabulary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": [1, 2]}, "does not make sense"),
        ({"tokenizer.ggml.eos_token_id": 320}, "names token 320: it has 320 tokens"),
        ({"tokenizer.ggml.merges": ["a zz"]}, r"merges \('a', 'zz'\)"),
    ],
)
def test_tokenizers_that_contradict_themselves_are_refused(change: dict[str, object], message: str, path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        tokenizer_files(path, read_vocabulary(path, GgufFile(path).metadata | change))


def test_a_bos_token_is_added_where_the_file_says_so(path: Path) -> None:
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary(path, GgufFile(path).metadata | {"tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_str(tokenizer_files(path, vocabulary)["tokenizer.json"].decode())
    assert tokenizer.encode("a").ids[0] == IM_START and len(tokenizer.encode("a").ids) == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_headers_raise_nothing_but_our_own_error(path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    original = path.read_bytes()
    header = GgufFile(path).tensors["token_embd.weight"].offset
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("flip") / "flipped.gguf"
    file.write_bytes(damaged)
    with contextlib.suppress(ArtifactError):
        artifact = open_artifact(file)
        open_source(artifact)
        tokenizer_files(file, read_vocabulary(file, GgufFile(file).metadata))


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(path: Path, tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    data = path.read_bytes()
    damaged = tmp_path_factory.mktemp("cut") / "cut.gguf"
    damaged.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ArtifactError):
        GgufFile(damaged)


@pytest.mark.parametrize("offset", [8, 16])
def test_absurd_counts_are_refused_before_anything_is_allocated(path: Path, tmp_path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 2**62)
    damaged = tmp_path / "absurd.gguf"
    damaged.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        GgufFile(damaged)


def test_unknown_tensor_types_and_families_are_named(folder: Path, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"token_embd\.weight is Q5_0: known: F32, F16, Q4_1, Q8_0"):
        GgufFile(tiny_gguf(folder, tmp_path / "other.gguf", ("Q5_0",)))
    file = GgufFile(path)
    file.metadata["general.architecture"] = "gemma"
    with pytest.raises(ArtifactError, match="architecture 'gemma'"):
        read_model(file)
    file.metadata["general.architecture"] = "llama"
    file.metadata["llama.expert_count"] = 8
    with pytest.raises(ArtifactError, match="mixture of experts"):
        read_model(file)


def test_missing_and_unknown_tensors_are_named(path: Path) -> None:
    file = GgufFile(path)
    model = read_model(file)
    moved = file.tensors.pop("blk.1.ffn_up.weight")
    with pytest.raises(ArtifactError, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        GgufSource(file, model)
    file.tensors |= {"blk.1.ffn_up.weight": moved, "blk.1.extra.weight": moved}
    with pytest.raises(ArtifactError, match=r"blk\.1\.extra\.weight"):
        GgufSource(file, model)
