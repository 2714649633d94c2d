"""One model's tokenizer: from text to token ids, and from a token id to its bytes.

Owns the byte table, so that decoding a stream needs a list look-up and a UTF-8 decoder, and no call into the tokenizer library. Nothing
changes after loading, because all threads share it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from orchestrator.router.frontend.chat_template import DEFAULT, PromptPiece, TemplateSource
from orchestrator.router.frontend.tokenizer_folder import read_template, read_tokenizer_folder
from workers.protocol.errors import ArtifactError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
#: Token texts that end a turn or a document in the llama family. Where a tokenizer has one as a special token, the token ends the output.
_ENDINGS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>")


class TokenTable:
    """``all[id]`` and ``visible[id]`` are the bytes of a token, special tokens being empty in ``visible``.

    Raises ArtifactError for a decoder that is not a function of one token at a time (llama-family tokenizers all are).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in added.items() if token.special}
        to_bytes = _converter(tokenizer.decoder)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.all = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, id in vocabulary.items():
            self.all[id] = text.encode() if id in added else to_bytes(text)
        #: The most characters of a text that become one token. A normalizer may join characters first (NFC: up to four).
        self.reach = max(1, max(map(len, self.all), default=0)) * (1 if tokenizer.normalizer is None else 4)
        self.visible = list(self.all)
        for id in self.specials.values():
            self.visible[id] = b""

    @property
    def size(self) -> int:
        return len(self.all)

    @functools.cached_property
    def _literal(self) -> Tokenizer:
        """A copy of the tokenizer that encodes the text of special tokens as plain text. It is made when it is first used."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _alone(self) -> bool:
        """Whether a text after a special token is encoded as if it stood alone. SentencePiece puts a blank before the first text only."""
        special = next(iter(self.specials), "")
        after = self._tokenizer.encode(f"{special}a", add_special_tokens=False).ids[1:]
        return not special or after == self._literal.encode("a", add_special_tokens=False).ids

    def _after_special(self, text: str) -> list[int]:
        """Ids of plain text behind a special token."""
        ids = _encode(self._literal, text)
        if self._alone:
            return ids
        line, both = _encode(self._literal, "\n"), _encode(self._literal, f"\n{text}")
        return both[len(line) :] if both[: len(line)] == line else ids

    def encode(self, pieces: Sequence[PromptPiece], add_special: bool, keep: int | None = None) -> list[int]:
        """Ids of the pieces in order; ``add_special``: also what the tokenizer itself adds around a prompt (bos). ``keep``: of more ids, so
        many at the end; what the tokenizer adds counts and stays."""
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if piece.exact and index:
                ids += self._after_special(piece.text)
                continue
            tokenizer = self._literal if piece.exact else self._tokenizer
            ids += _encode(tokenizer, piece.text, add_special=add_special and index == 0)
        if keep is None or len(ids) <= keep:
            return ids
        before = self._added_before if add_special else 0
        return ids[:before] + ids[before + len(ids) - keep :] if before <= keep else ids[-keep:]

    @functools.cached_property
    def _added_before(self) -> int:
        """How many ids the tokenizer itself puts before a prompt."""
        mask = self._tokenizer.encode("a").special_tokens_mask
        return next((index for index, added in enumerate(mask) if not added), 0)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - tables live as long as the process
    def showing(self, markers: tuple[str, ...]) -> list[bytes]:
        """``visible`` with the special tokens that are ``markers``."""
        found = [id for text, id in self.specials.items() if text in markers]
        if not found:
            return self.visible
        table = list(self.visible)
        for id in found:
            table[id] = self.all[id]
        return table

    def pick(self, table: list[bytes], ids: Sequence[int]) -> bytes:
        """The bytes of ``ids`` in ``table`` (``all`` or ``visible``). An id beyond the table (in a padded vocabulary) has no bytes."""
        try:
            if len(ids) == 1:
                return table[ids[0]]
            return b"".join([table[id] for id in ids])
        except IndexError:
            return b"".join([table[id] for id in ids if id < len(table)])

    def join(self, ids: Sequence[int], skip_special: bool = True) -> bytes:
        return self.pick(self.visible if skip_special else self.all, ids)


def _encode(tokenizer: Tokenizer, text: str, *, add_special: bool = False) -> list[int]:
    """The ids of ``text``. Other threads run meanwhile: ``Tokenizer.encode`` would hold the interpreter's lock for as long as it works."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
    return ids


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a model's tokenizer folder. ``eos_ids`` end the output unless the request ignores them. ``generation``: the object in
    generation_config.json."""

    table: TokenTable
    template: TemplateSource | None
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]


def load(folder: str, chat_template: str = "") -> Loaded:
    """Read a tokenizer folder. ``chat_template``: a file with the template to use in place of the folder's own.

    Raises ArtifactError with the name of the file.
    """
    found = read_tokenizer_folder(Path(folder))
    table = TokenTable(found.tokenizer)
    templates = {DEFAULT: read_template(Path(chat_template))} if chat_template else found.templates
    template = TemplateSource(templates=templates, specials=tuple(table.specials), tokens=found.named) if templates else None
    return Loaded(table=table, template=template, eos_ids=_eos_ids(table, found.named, found.generation), generation=found.generation)


def _converter(decoder: Any) -> Any:
    described: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = described.get("decoders", [described] if described else [])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return _from_byte_level
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return _from_pieces
    raise ArtifactError(
        f"the tokenizer's decoder {sorted(map(str, kinds))} is not supported", "it is neither byte-level nor sentencepiece-like", ""
    )


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: a printable byte is written as itself, every other byte as a character from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _from_byte_level(text: str) -> bytes:
    table = _byte_of_char()
    return bytes([table[char] for char in text]) if all(char in table for char in text) else text.encode()


def _from_pieces(text: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace("\u2581", " ").encode()


def _eos_ids(table: TokenTable, tokens: dict[str, str], generation: dict[str, Any]) -> tuple[int, ...]:
    listed = generation.get("eos_token_id")
    ids = [id for id in (listed if isinstance(listed, list) else [listed]) if type(id) is int]
    ids += [table.specials[text] for text in (tokens.get("eos_token", ""), *_ENDINGS) if text in table.specials]
    return tuple(dict.fromkeys(ids))
