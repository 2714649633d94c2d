"""Folders without tokenizer.json: what transformers makes of the tokenizer's other forms is served, and built once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.model_store import tokenizer_folder
from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.tokenizer import load
from orchestrator.tokenizer_build import build as building
from orchestrator.tokenizer_build.build import sources
from tests.support.scripts import WORDS, texts
from workers.protocol.errors import ArtifactError, EnvironmentFault


def sentencepiece_folder(folder: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(1500, seed=1) + list(WORDS) * 3), model_writer=data, model_type="bpe", vocab_size=1200,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(data.getvalue())
    config(folder, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "chat_template": "{{ messages }}"})
    return folder


def merges_folder(folder: Path) -> Path:
    """GPT-2's two files, by the library's own trainer."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts(500, seed=2), vocab_size=700, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    config(folder, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    return folder


def config(folder: Path, keys: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')


@pytest.mark.parametrize(("make", "count"), [pytest.param(sentencepiece_folder, 10_000, marks=pytest.mark.long), (merges_folder, 500)])
def test_ids_are_those_of_transformers(make: Any, count: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    built = tokenizer_folder(folder, tmp_path / "cache")
    oracle, loaded = transformers.AutoTokenizer.from_pretrained(folder), load(str(built))
    for text in [*texts(count, seed=3), *WORDS]:
        assert loaded.table.encode([PromptPiece(text=text, exact=False)], add_special=True) == oracle.encode(text), text
    assert loaded.generation["temperature"] == 0.5
    before = built.stat().st_mtime_ns
    assert tokenizer_folder(folder, tmp_path / "cache") == built and built.stat().st_mtime_ns == before
    config(folder, json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|endoftext|>"})
    assert tokenizer_folder(folder, tmp_path / "cache") != built


def test_which_files_make_a_tokenizer(tmp_path: Path) -> None:
    assert sources(tmp_path) == []
    (tmp_path / "vocab.json").touch()
    assert sources(tmp_path) == []
    (tmp_path / "merges.txt").touch()
    assert [path.name for path in sources(tmp_path)] == ["vocab.json", "merges.txt"]
    (tmp_path / "tokenizer.json").touch()
    assert sources(tmp_path) == []


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="has no tokenizer: routers need"):
        tokenizer_folder(tmp_path, tmp_path / "cache")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"transformers makes it from tokenizer\.model") as caught:
        tokenizer_folder(tmp_path, tmp_path / "cache")
    assert "trireme-llm[convert]" in caught.value.hint
