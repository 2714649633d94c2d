"""SentencePiece tokenizers in GGUF files: the same ids as the sentencepiece package, for texts of twenty scripts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.scripts import WORDS, texts
from workers.artifacts.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    end_ids,
    read_vocabulary,
    tokenizer_files,
)
from workers.protocol.errors import ArtifactError

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def model() -> Any:
    """A BPE model trained as Llama's was: no normalization, digits alone, bytes for what has no piece."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(1500, seed=1) + list(WORDS) * 3), model_writer=data, model_type="bpe", vocab_size=1200,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.995, user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())


def keys(model: Any, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""
    size = range(model.vocab_size())

    def kind(id: int) -> int:
        if model.is_unknown(id):
            return UNKNOWN
        if model.is_control(id):
            return CONTROL
        return BYTE if model.is_byte(id) else USER_DEFINED if model.id_to_piece(id) == "<tool>" else NORMAL

    found = {
        "model": "llama",
        "tokens": [model.id_to_piece(id) for id in size],
        "scores": [model.get_score(id) for id in size],
        "token_type": [kind(id) for id in size],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (found | changes).items() if value is not None}


def load(model: Any, **changes: Any) -> tuple[Vocabulary, dict[str, bytes], Tokenizer]:
    vocabulary = read_vocabulary(Path("m.gguf"), keys(model, **changes))
    files = tokenizer_files(Path("m.gguf"), vocabulary)
    return vocabulary, files, Tokenizer.from_str(files["tokenizer.json"].decode())


def test_ids_are_those_of_sentencepiece(model: Any) -> None:
    _, _, tokenizer = load(model)
    for text in [*texts(500), *WORDS, "", " ", "a", "  a  b"]:
        expected = [model.bos_id(), *model.encode(text)]
        found = tokenizer.encode(text).ids
        # Control tokens in a text are read, which sentencepiece never does.
        if "<s>" not in text and "</s>" not in text:
            assert found == expected, (text, model.id_to_piece(expected), tokenizer.encode(text).tokens)
            assert tokenizer.decode(found) == model.decode(expected)


def test_what_a_file_does_not_say_is_as_llama_cpp_takes_it(model: Any) -> None:
    vocabulary, files, tokenizer = load(model)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert (config["add_bos_token"], config["add_eos_token"], end_ids(vocabulary)) == (True, False, (2,))
    assert "".join(tokenizer.encode("<s>a</s>b").tokens) == "<s><s>\u2581a</s>\u2581b"
    _, _, bare = load(model, add_bos_token=False, add_space_prefix=False, add_eos_token=True)
    assert bare.encode("a").tokens == ["a", "</s>"]
    assert bare.decode(bare.encode("ab  c").ids) == "ab  c"


def test_a_file_without_scores_is_refused(model: Any) -> None:
    with pytest.raises(ArtifactError, match="0 scores for 1200 tokens"):
        load(model, scores=None)
