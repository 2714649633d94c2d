"""GGUF: our reader against the format's own package and against transformers' load; damaged files are refused, never trusted."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.support.examples import examples
from tests.support.gguf_blocks import FACTORS
from tests.support.tiny_models import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.gguf import GgufFile, GgufSource, read_model
from workers.artifacts.gguf_tokenizer import end_ids, read_vocabulary, tokenizer_files
from workers.layout.sharding import Span, gguf_names, whole_tensors
from workers.models.rope import inverse_frequencies
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hf"), hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2)


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf", ("F32", "F16", "Q8_0", "Q4_1"))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every type that has blocks; a qwen2, whose rows are not permuted."""
    source = tiny_model(
        tmp_path_factory.mktemp("blocks"), architecture="qwen2", hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, layers=2
    )
    return tiny_gguf(source, tmp_path_factory.mktemp("gguf") / "blocks.gguf", tuple(FACTORS))


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


def test_quantized_weights_equal_the_packages_own_dequantization(blocks: Path) -> None:
    file = GgufFile(blocks)
    oracle = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(blocks)).tensors}
    kinds = set()
    for name, info in file.tensors.items():
        kinds.add(info.format.name)
        source = GgufSource(file, read_model(file))
        model = read_model(file)
        tensor = next(t for n, t in whole_tensors(model).items() if gguf_names(model)[n] == name)
        assert np.array_equal(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values, oracle[name]), name
    assert kinds == {"F32", *FACTORS}


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_a_slice_is_the_slice_of_the_whole(path: Path, blocks: Path, data: st.DataObject) -> None:
    file = GgufFile(data.draw(st.sampled_from([path, blocks])))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer 't5' \(SentencePiece \(Unigram\)\)"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer 'bert' \(WordPiece\)"),
        ({"tokenizer.ggml.pre": "gpt-4o"}, "pre-tokenizer 'gpt-4o' is not supported"),
        ({"tokenizer.ggml.pre": None}, r"does not name its pre-tokenizer \(tokenizer\.ggml\.pre\)"),
        ({"tokenizer.ggml.pre": ""}, r"does not name its pre-tokenizer \(tokenizer\.ggml\.pre\)"),
    ],
)
def test_other_tokenizers_are_refused_by_name(change: dict[str, object], message: str, path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        tokenizer_files(path, read_vocabulary(path, changed(path, change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": [1, 2]}, "does not make sense"),
        ({"tokenizer.ggml.eos_token_id": 320}, "names token 320: it has 320 tokens"),
        ({"tokenizer.ggml.merges": ["a zz"]}, r"merges \('a', 'zz'\)"),
        ({"tokenizer.ggml.token_type": [1] * 320}, r"has no tokenizer\.ggml\.merges: tokens such as '<\|im_start\|>'"),
        ({"tokenizer.ggml.token_type": [1] * 9}, "9 types for 320 tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 320}, "has a token twice"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "no bos_token_id"),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": None}, "no eos_token_id"),
    ],
)
def test_tokenizers_that_contradict_themselves_are_refused(change: dict[str, object], message: str, path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        tokenizer_files(path, read_vocabulary(path, changed(path, change)))


def changed(path: Path, change: dict[str, object]) -> dict[str, Any]:
    """The metadata of ``path`` with keys changed; None removes one."""
    return {key: value for key, value in (GgufFile(path).metadata | change).items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("smollm", None, None, (False, False)),
        ("qwen2", None, None, (False, False)),
        ("gpt-2", True, None, (True, False)),
        ("llama-bpe", None, None, (True, False)),
        ("llama3", None, None, (True, False)),
        ("tekken", None, None, (True, False)),
        ("dbrx", None, None, (False, False)),
        ("llama-bpe", False, None, (False, False)),
        ("llama-bpe", True, True, (True, True)),
        ("qwen2", None, True, (False, True)),
    ],
)
def test_bos_and_eos_are_added_as_llama_cpp_adds_them(
    pre: str, add_bos: bool | None, add_eos: bool | None, expected: tuple[bool, bool], path: Path
) -> None:
    """llama.cpp's llama_vocab: the pre-tokenizer decides where the file says nothing, and nothing adds eos by itself."""
    from tokenizers import Tokenizer

    keys = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    files = tokenizer_files(path, read_vocabulary(path, changed(path, keys)))
    ids = Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").ids
    assert ids == [IM_START] * expected[0] + [ord("a")] + [IM_END] * expected[1]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == expected


_WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
#: From llama.cpp's src/llama-vocab.cpp, as it writes them: patterns applied one after another to what the ones before left.
LLAMA_CPP_PATTERNS = {
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+", r"[0-9][0-9][0-9]",
    ),
    "gpt-2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",),
    "smollm": (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    "deepseek-r1-qwen": (
        _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "llama-v3": (
        _WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
        r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}  # fmt: skip


def split_in_turn(patterns: tuple[str, ...], text: str) -> list[str]:
    regex = pytest.importorskip("regex")
    pieces = [text]
    for pattern in patterns:
        cut: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match[0]]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


@pytest.mark.parametrize("pre", LLAMA_CPP_PATTERNS)
def test_text_is_cut_as_llama_cpp_cuts_it(pre: str, path: Path) -> None:
    from tokenizers import Tokenizer

    files = tokenizer_files(path, read_vocabulary(path, changed(path, {"tokenizer.ggml.pre": pre})))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    text = "It's 12345 o'clock,  they'LL say: a+b<=c\n\n  x == 3.14159;\tHELLO WorldIDs \u00e9t\u00e9 \u65e5\u672c ...  "
    pieces = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == split_in_turn(LLAMA_CPP_PATTERNS[pre], text)


def test_tokens_that_end_a_text_are_control_tokens_even_where_the_file_says_otherwise(path: Path) -> None:
    from tokenizers import Tokenizer

    types = [3 if id == IM_START else 1 if id < 259 else 5 for id in range(320)]
    vocabulary = read_vocabulary(path, changed(path, {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": None}))
    assert end_ids(vocabulary) == (ENDOFTEXT, IM_END)
    files = tokenizer_files(path, vocabulary)
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a<|im_end|>").ids == [ord("a"), IM_END]


def test_an_ordinary_token_is_no_special_one_for_its_role(path: Path) -> None:
    odd = changed(path, {"tokenizer.ggml.padding_token_id": ord("!"), "tokenizer.ggml.unknown_token_id": ENDOFTEXT})
    config = json.loads(tokenizer_files(path, read_vocabulary(path, odd))["tokenizer_config.json"])
    assert "pad_token" not in config and config["unk_token"] == "<|endoftext|>"


def test_named_chat_templates_are_kept(path: Path) -> None:
    named = changed(path, {"tokenizer.chat_template.tool_use": "with tools"})
    config = json.loads(tokenizer_files(path, read_vocabulary(path, named))["tokenizer_config.json"])
    assert {entry["name"]: entry["template"] for entry in config["chat_template"]} == {"default": CHAT_TEMPLATE, "tool_use": "with tools"}


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, None),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 2.0}, 2.0),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
        ({"scaling.type": "linear", "scaling.factor": 8.0}, 8.0),
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear"}, None),
        ({"scaling.type": "none", "scaling.factor": 2.0}, None),
        ({"scaling.type": "none", "scale_linear": 2.0}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.factor": 0.0, "scale_linear": 4.0}, None),
        ({"scaling.factor": 1.0}, None),
    ],
)
def test_rope_scaling_is_what_llama_cpp_makes_of_the_keys(keys: dict[str, object], factor: float | None, path: Path) -> None:
    """llama.cpp's load_hparams: type ``linear`` by default; the factor, else the old key; a factor of 0 is 1; ``none`` never scales."""
    file = GgufFile(path)
    file.metadata |= {f"llama.rope.{key}": value for key, value in keys.items()}
    assert read_model(file).ropes[0].scaling == (None if factor is None else LinearScaling(factor=factor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "su"}, "rope scaling 'su'"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor"),
        ({"llama.attention.value_length": 8}, "values of another length"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"llama.attention.causal": False}, "makes embeddings"),
        ({"general.type": "adapter"}, "is a LoRA adapter, not a model"),
        ({"general.architecture": "clip"}, "is an image encoder"),
        ({"llama.context_length": None}, r"lacks llama\.context_length"),
    ],
)
def test_models_that_are_not_computed_are_refused_by_name(change: dict[str, object], message: str, path: Path) -> None:
    file = GgufFile(path)
    file.metadata = changed(path, change)
    with pytest.raises(ArtifactError, match=message):
        read_model(file)


def test_rotary_divisors_are_llama_3s_rule_worked_out(folder: Path, tmp_path: Path) -> None:
    """The loop by which llama.cpp's converter writes ``rope_freqs.weight``."""
    low, high, factor, original = 1.0, 4.0, 8.0, 64
    divisors = []
    for frequency in 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16):
        wavelength = 2 * np.pi / frequency
        smooth = (original / wavelength - low) / (high - low)
        kept, divided = wavelength < original / high, wavelength > original / low
        divisors.append(1.0 if kept else factor if divided else 1 / ((1 - smooth) / factor + smooth))
    file = GgufFile(tiny_gguf(folder, tmp_path / "own.gguf", rope_freqs=np.array(divisors)))
    (rope,) = read_model(file).ropes
    rule = RopeSpec(
        dim=16, scaling=Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=original)
    )
    torch.testing.assert_close(inverse_frequencies(rope, 512), inverse_frequencies(rule, 512), rtol=1e-6, atol=0)
    GgufSource(file, read_model(file))


def test_yarn_is_what_llama_cpp_computes(path: Path) -> None:
    """ggml's rope_yarn: cosines and sines times attn_factor * (1 + 0.1 ln factor)."""
    file = GgufFile(path)
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "attn_factor": 0.5, "yarn_beta_fast": 16.0}
    file.metadata |= {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    expected = YarnScaling(factor=4.0, attention_factor=0.5 * (1 + 0.1 * math.log(4.0)), original_max_position=128, beta_fast=16.0)
    assert read_model(file).ropes[0].scaling == expected


def test_longrope_divisors_lie_in_two_tensors(folder: Path, tmp_path: Path) -> None:
    short, long = np.arange(1.0, 9.0), np.arange(2.0, 10.0)
    file = GgufFile(tiny_gguf(folder, tmp_path / "long.gguf", rope_factors_short=short, rope_factors_long=long))
    file.metadata |= {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.original_context_length": 64}
    file.metadata["llama.rope.scaling.attn_factor"] = 1.25
    expected = LongRopeScaling(short=tuple(short), long=tuple(long), attention_factor=1.25, original_max_position=64)
    assert read_model(file).ropes[0].scaling == expected


def test_values_may_be_stored_once_a_layer(path: Path) -> None:
    file = GgufFile(path)
    expected = read_model(file)
    file.metadata |= {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]}
    assert read_model(file) == expected


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(folder, tmp_path_factory.mktemp("parts") / "tiny.gguf", ("F16", "Q8_0"), split=9)


def test_all_parts_of_a_split_file_are_read(folder: Path, parts: Path, tmp_path: Path) -> None:
    file, whole = GgufFile(parts), GgufFile(tiny_gguf(folder, tmp_path / "whole.gguf", ("F16", "Q8_0")))
    assert [each.name for each in file.files] == ["tiny-00001-of-00003.gguf", "tiny-00002-of-00003.gguf", "tiny-00003-of-00003.gguf"]
    assert read_model(file) == read_model(whole)
    split, joined = GgufSource(file, read_model(file)), GgufSource(whole, read_model(whole))
    for tensor in whole_tensors(read_model(whole)).values():
        span = Span(0, tensor.shape[tensor.axis])
        assert np.array_equal(split.read(tensor, span).values, joined.read(tensor, span).values), tensor.name


def test_parts_that_are_missing_or_misplaced_are_named(parts: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(part, tmp_path)) for part in GgufFile(parts).files]
    with pytest.raises(ArtifactError, match=r"is part 2 of 3 of a split GGUF") as caught:
        open_artifact(copies[1])
    assert caught.value.hint == f"give {copies[0]}"
    data = copies[2].read_bytes()
    copies[2].unlink()
    with pytest.raises(ArtifactError, match=r"tiny-00003-of-00003\.gguf is missing: the GGUF is split into 3 parts"):
        open_artifact(copies[0])
    shutil.copy(copies[1], copies[2])
    with pytest.raises(ArtifactError, match=r"tiny-00003-of-00003\.gguf is not part 3"):
        open_artifact(copies[0])
    copies[2].write_bytes(data[:-100])
    with pytest.raises(ArtifactError, match=r"tiny-00003-of-00003\.gguf"):
        open_artifact(copies[0])
    copies[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ArtifactError, match="is part 1 of 3 of a split GGUF") as caught:
        open_artifact(tmp_path / "renamed.gguf")
    assert caught.value.hint == "rename it to NAME-00001-of-00003.gguf, as the others"


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n")
    with pytest.raises(ArtifactError, match=r"x\.gguf is a Git LFS pointer"):
        open_artifact(tmp_path / "x.gguf")


@settings(max_examples=examples(60), deadline=None)
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


@settings(max_examples=examples(60), deadline=None)
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


def test_unknown_tensor_types_and_families_are_named(path: Path, tmp_path: Path) -> None:
    wide = tiny_model(tmp_path / "wide", hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=256, layers=1)
    with pytest.raises(ArtifactError, match=r"token_embd\.weight is TQ2_0: known: F32, F16, Q4_0"):
        GgufFile(tiny_gguf(wide, tmp_path / "other.gguf", ("TQ2_0",)))
    file = GgufFile(path)
    file.metadata["general.architecture"] = "mamba"
    with pytest.raises(ArtifactError, match="architecture 'mamba'"):
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
