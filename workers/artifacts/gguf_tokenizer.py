"""The tokenizer inside a GGUF file as a tokenizer folder: ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``.

Owns the mapping from GGUF's names of pre-tokenizers to rules. Only byte-level BPE (``gpt2``) is supported; other kinds are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from workers.artifacts.safetensors_file import COPY_AGAIN
from workers.protocol.errors import ArtifactError

#: ``tokenizer.ggml.token_type`` values.
CONTROL, USER_DEFINED = 3, 4
#: Tokens that end a turn or a text, whatever the metadata says about them.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _pre_tokenizer(kind: str) -> Any:
    """The pre-tokenizer rules with the GGUF name ``kind``; None for an unknown name."""
    split = {"llama-bpe": LLAMA3, "qwen2": QWEN2}
    if kind in split:
        pattern = pre_tokenizers.Split(Regex(split[kind]), "isolated")
        return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2 if kind in ("gpt-2", "default") else None


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """The keys ``tokenizer.ggml.*`` by their last word, and ``tokenizer.chat_template``."""

    model: str = ""
    pre: str = "default"
    tokens: list[str] = []
    token_type: list[int] = []
    merges: list[str] = []
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool = False
    chat_template: str | None = None

    def named(self, kind: str) -> str | None:
        """The token with the role ``kind`` (``bos``, ``eos`` ...), if there is one."""
        id = getattr(self, f"{kind}_token_id")
        return None if id is None else self.tokens[id]


def read_vocabulary(path: Path, metadata: dict[str, Any]) -> Vocabulary:
    """The tokenizer's part of a GGUF file's metadata. Raises :class:`ArtifactError` where it is not valid."""
    words = {key.rpartition(".")[2]: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    try:
        found = msgspec.convert(words, Vocabulary)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{path}: the tokenizer does not make sense", str(error), COPY_AGAIN) from error
    ids = (found.bos_token_id, found.eos_token_id, found.eot_token_id, found.unknown_token_id, found.padding_token_id)
    if outside := [id for id in ids if id is not None and not 0 <= id < len(found.tokens)]:
        raise ArtifactError(f"{path}: the tokenizer names token {outside[0]}", f"it has {len(found.tokens)} tokens", COPY_AGAIN)
    return found


def end_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """End-of-sequence ids: those of the metadata first, then every control token that is known to end a text."""
    found = [id for id in (vocabulary.eos_token_id, vocabulary.eot_token_id) if id is not None]
    kinds = zip(vocabulary.tokens, vocabulary.token_type, strict=False)
    found += [id for id, (token, kind) in enumerate(kinds) if kind == CONTROL and token in END_TOKENS]
    return tuple(dict.fromkeys(found))


def tokenizer_files(path: Path, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The folder's files by name. ``path`` is for messages. Raises :class:`ArtifactError` for a tokenizer that is not byte-level BPE."""
    rules = _pre_tokenizer(vocabulary.pre)
    if vocabulary.model != "gpt2" or rules is None:
        what = f"tokenizer {vocabulary.model!r} with pre-tokenizer {vocabulary.pre!r}"
        raise ArtifactError(f"{path}: {what} is not supported", "only byte-level BPE is", "use the safetensors model")
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    if strange := next((pair for pair in merges if not ids.keys() >= {*pair, "".join(pair)}), None):
        raise ArtifactError(f"{path}: the tokenizer merges {strange} into a token that it does not have", "the file is damaged", COPY_AGAIN)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=vocabulary.pre == "llama-bpe"))
    tokenizer.pre_tokenizer = rules
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for token, kind in zip(vocabulary.tokens, vocabulary.token_type, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    bos = vocabulary.named("bos")
    if vocabulary.add_bos_token and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, ids[bos])])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(_config(vocabulary), indent=2).encode(),
        "generation_config.json": json.dumps({"eos_token_id": list(end_ids(vocabulary))}).encode(),
    }


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos_token,
        "clean_up_tokenization_spaces": False,
    }
    for kind, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token = vocabulary.named(kind)
        if token is not None:
            config[name] = token
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config
