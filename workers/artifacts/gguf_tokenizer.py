"""The tokenizer inside a GGUF file as a tokenizer folder: ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``.

Owns the mapping from GGUF's names of pre-tokenizers to rules. Byte-level BPE (``gpt2``) and SentencePiece's BPE (``llama``) are supported;
other kinds are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from workers.artifacts.safetensors_file import COPY_AGAIN
from workers.artifacts.sentencepiece_bpe import sentencepiece_tokenizer
from workers.protocol.errors import ArtifactError

#: ``tokenizer.ggml.token_type`` values.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
#: What a SentencePiece file means whose keys say nothing: the ids of its special tokens, as llama.cpp takes them.
_SENTENCEPIECE = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Tokens that end a turn or a text, whatever the metadata says about them. A file that does not mark one as a control token is mistaken.
END_TOKENS = (
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<EOT>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """How text is cut before merges, in llama.cpp's terms: ``patterns`` are applied one after another, and what one of them finds stays
    together. ``add_bos``: what holds where a file does not say it."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_BY_RULE = (
    (
        PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (PreTokenizer((LLAMA3,)), "dbrx smaug-bpe chatglm-bpe glm4"),
    (PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (PreTokenizer((r"\p{N}", GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (PreTokenizer((GPT2,)), "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling"),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
)
#: By the value of ``tokenizer.ggml.pre``. From llama.cpp's src/llama-vocab.cpp; patterns that it rewrites are in their original form.
PRE_TOKENIZERS = {name: rule for rule, names in _BY_RULE for name in names.split()}


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """The keys ``tokenizer.ggml.*`` by their last word, and the chat templates by name (``default`` has none in the file)."""

    model: str = ""
    pre: str | None = None
    tokens: list[str] = []
    token_type: list[int] = []
    scores: list[float] = []
    merges: list[str] = []
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    chat_templates: dict[str, str] = {}

    def named(self, kind: str) -> str | None:
        """The token with the role ``kind`` (``bos``, ``eos`` ...), if there is one."""
        id = getattr(self, f"{kind}_token_id")
        return None if id is None else self.tokens[id]

    def typed(self) -> list[tuple[str, int]]:
        """(token, type) of every token, as llama.cpp sees them: normal where the file has no types, control where it ends a text."""
        types = self.token_type or [NORMAL] * len(self.tokens)
        return [(token, CONTROL if token in END_TOKENS else kind) for token, kind in zip(self.tokens, types, strict=False)]


def read_vocabulary(path: Path, metadata: dict[str, Any]) -> Vocabulary:
    """The tokenizer's part of a GGUF file's metadata. Raises :class:`ArtifactError` where it is not valid."""
    words = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    template = "tokenizer.chat_template"
    words["chat_templates"] = {
        key.removeprefix(template).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == template or key.startswith(template + ".")
    }
    if words.get("model") == "llama":
        words = _SENTENCEPIECE | words
    try:
        found = msgspec.convert(words, Vocabulary)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{path}: the tokenizer does not make sense", str(error), COPY_AGAIN) from error
    ids = (found.bos_token_id, found.eos_token_id, found.eot_token_id, found.eom_token_id, found.unknown_token_id, found.padding_token_id)
    if outside := [id for id in ids if id is not None and not 0 <= id < len(found.tokens)]:
        raise ArtifactError(f"{path}: the tokenizer names token {outside[0]}", f"it has {len(found.tokens)} tokens", COPY_AGAIN)
    if found.token_type and len(found.token_type) < len(found.tokens):
        why = f"{len(found.token_type)} types for {len(found.tokens)} tokens"
        raise ArtifactError(f"{path}: the tokenizer does not make sense", why, COPY_AGAIN)
    return found


def end_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """End-of-sequence ids: those of the metadata first, then every token that is known to end a text."""
    found = [id for id in (vocabulary.eos_token_id, vocabulary.eot_token_id, vocabulary.eom_token_id) if id is not None]
    found += [id for id, token in enumerate(vocabulary.tokens) if token in END_TOKENS]
    return tuple(dict.fromkeys(found))


def tokenizer_files(path: Path, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The folder's files by name. ``path`` is for messages. Raises :class:`ArtifactError` for a tokenizer that is no BPE."""
    ids = {token or f"[EMPTY_{id}]": id for id, token in enumerate(vocabulary.tokens)}
    if len(ids) < len(vocabulary.tokens):
        why = f"{len(vocabulary.tokens)} tokens have {len(ids)} different texts"
        raise ArtifactError(f"{path}: the tokenizer has a token twice", why, COPY_AGAIN)
    if vocabulary.model == "llama":
        tokenizer, adds_bos = _sentencepiece(path, vocabulary, ids), True
    else:
        rules = _rules(path, vocabulary)
        tokenizer, adds_bos = _byte_level(path, vocabulary, ids, rules), rules.add_bos
    for token, kind in vocabulary.typed():
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])
    before, after = _added(path, vocabulary, adds_bos=adds_bos)
    if before or after:
        around = [(token, ids[token]) for token in dict.fromkeys(before + after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=around)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(_config(vocabulary, add_bos=bool(before)), indent=2).encode(),
        "generation_config.json": json.dumps({"eos_token_id": list(end_ids(vocabulary))}).encode(),
    }


def _byte_level(path: Path, vocabulary: Vocabulary, ids: dict[str, int], rules: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(path, vocabulary, ids), ignore_merges=rules.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(path: Path, vocabulary: Vocabulary, ids: dict[str, int]) -> Tokenizer:
    """As llama.cpp reads it: a blank is put before every text, behind a special token too."""
    if len(vocabulary.scores) < len(vocabulary.tokens):
        why = (
            f"{len(vocabulary.scores)} scores for {len(vocabulary.tokens)} tokens: without them nothing says which pieces are joined first"
        )
        raise ArtifactError(f"{path}: the tokenizer does not make sense", why, COPY_AGAIN)
    scores = {
        token: score
        for (token, kind), score in zip(vocabulary.typed(), vocabulary.scores, strict=False)
        if kind in (NORMAL, USER_DEFINED) and token
    }
    return sentencepiece_tokenizer(ids, scores, unknown=vocabulary.named("unknown"), prefix=vocabulary.add_space_prefix)


def _rules(path: Path, vocabulary: Vocabulary) -> PreTokenizer:
    if vocabulary.model != "gpt2":
        kinds = {
            "t5": "SentencePiece (Unigram)",
            "bert": "WordPiece",
            "no_vocab": "no tokenizer",
            "": "no tokenizer",
        }
        what = f"tokenizer {vocabulary.model!r} ({kinds.get(vocabulary.model, 'another kind')})"
        raise ArtifactError(
            f"{path}: {what} is not supported", "known: gpt2 (byte-level BPE), llama (SentencePiece BPE)", "use the safetensors model"
        )
    if not vocabulary.pre:
        why = "without it the text cannot be cut as the model learned it"
        hint = "convert the model again with a llama.cpp of May 2024 or later, or use the safetensors model"
        raise ArtifactError(f"{path} does not name its pre-tokenizer (tokenizer.ggml.pre)", why, hint)
    if vocabulary.pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ArtifactError(f"{path}: pre-tokenizer {vocabulary.pre!r} is not supported", f"known: {known}", "use the safetensors model")
    return PRE_TOKENIZERS[vocabulary.pre]


def _merges(path: Path, vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    if strange := next((pair for pair in merges if not ids.keys() >= {*pair, "".join(pair)}), None):
        raise ArtifactError(f"{path}: the tokenizer merges {strange} into a token that it does not have", "the file is damaged", COPY_AGAIN)
    if not merges and (long := next((token for token, kind in vocabulary.typed() if kind == NORMAL and len(token) > 1), None)):
        raise ArtifactError(f"{path} has no tokenizer.ggml.merges", f"tokens such as {long!r} are made by merges", COPY_AGAIN)
    return merges


def _added(path: Path, vocabulary: Vocabulary, *, adds_bos: bool) -> tuple[list[str], list[str]]:
    """The tokens that are put before and after a prompt. ``adds_bos``: what holds where the file does not say it."""
    add_bos = adds_bos if vocabulary.add_bos_token is None else vocabulary.add_bos_token
    found = []
    for kind, wanted in (("bos", add_bos), ("eos", vocabulary.add_eos_token)):
        token = vocabulary.named(kind)
        if wanted and token is None:
            why = f"its prompts get a {kind} token, and there is no {kind}_token_id"
            raise ArtifactError(f"{path}: the tokenizer does not make sense", why, "use the safetensors model")
        found.append([token] if wanted and token is not None else [])
    return found[0], found[1]


def _config(vocabulary: Vocabulary, *, add_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": vocabulary.add_eos_token,
        "clean_up_tokenization_spaces": False,
    }
    types = dict(vocabulary.typed())
    for kind, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token = vocabulary.named(kind)
        # A token with a name is special: an ordinary one that a file gives as its padding ("!") would vanish from every text.
        if token is not None and (kind in ("bos", "eos") or types[token] in (CONTROL, UNKNOWN)):
            config[name] = token
    templates = vocabulary.chat_templates
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    return config
