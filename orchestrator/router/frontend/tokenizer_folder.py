"""A tokenizer folder: the tokenizer with every special token, and the chat templates, wherever the folder names them.

Owns where special tokens and templates can stand, and which place wins: as transformers 5 reads the same files. It reads files and keeps
nothing.

    special tokens: added_tokens_decoder of tokenizer_config.json; without it special_tokens_map.json, added_tokens.json, and added_tokens
                    of tokenizer.json, of which later ones win; then the keys bos_token, eos_token ... and extra_special_tokens
    templates:      chat_template.jinja and additional_chat_templates/NAME.jinja; else chat_template of tokenizer_config.json; else
                    chat_template.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from orchestrator.router.frontend.chat_template import DEFAULT, TemplateFile
from workers.artifacts.git_lfs import refuse_pointer
from workers.artifacts.hf import MORE_TEMPLATES
from workers.artifacts.json_file import decode
from workers.artifacts.safetensors_file import regular
from workers.protocol.errors import ArtifactError

_HINT = "convert or pull the model again"
#: Flags of a token that its description in a file may have.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: Keys that name a special token in every tokenizer; other keys that end in ``_token`` are a model's own.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFolder(msgspec.Struct, frozen=True, kw_only=True):
    """``named``: the texts of special tokens by their key (``eos_token``). ``generation``: generation_config.json."""

    tokenizer: Tokenizer
    named: dict[str, str]
    templates: dict[str, TemplateFile]
    generation: dict[str, Any]


def read_tokenizer_folder(root: Path) -> TokenizerFolder:
    """Raises ArtifactError with the name of the file."""
    try:
        config = _read_json(root / "tokenizer_config.json")
        source = regular(root / "tokenizer.json").read_bytes()
        refuse_pointer(root / "tokenizer.json", source)
        tokenizer, named = _with_special_tokens(root, source, config)
        templates, generation = _templates(root, config), _read_json(root / "generation_config.json")
    except OSError as error:
        raise ArtifactError(f"cannot read {error.filename}", str(error.strerror), _HINT) from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"the tokenizer in {root} is damaged", str(error)[:200], _HINT) from None
    return TokenizerFolder(tokenizer=tokenizer, named=named, templates=templates, generation=generation)


def read_template(path: Path) -> TemplateFile:
    """A template from a file that an operator named. Raises ArtifactError."""
    try:
        return TemplateFile(source=regular(path).read_text("utf-8"), origin=str(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}", str(error.strerror), "name a file with a chat template (chat_template)") from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is no text", str(error), "name a file with a chat template (chat_template)") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, none if it is not there."""
    return decode(path, dict[str, Any]) if path.exists() else {}


def _with_special_tokens(root: Path, source: bytes, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer with every token that the folder's files add, and the texts of the named ones."""
    try:
        tokenizer = Tokenizer.from_buffer(source)
    except Exception as error:  # the library raises a plain Exception
        raise ValueError(str(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    described = {id: _token(token) for id, token in _config_tokens(config).items()}
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_json(root / "special_tokens_map.json")}
        special = {_text(token) for token in (*_named(config).values(), *_extra(config))}
        for text, id in _read_json(root / "added_tokens.json").items():
            described[id] = AddedToken(text, normalized=text not in special, special=text in special)
        described |= tokenizer.get_added_tokens_decoder()
    by_text = {token.content: token for token in described.values()}
    added = [described[id] for id in sorted(described)]
    named = _named(config)
    for token in (*named.values(), *_extra(config)):
        found = by_text.get(_text(token)) or _token(token, special=True)
        found.special = True
        added.append(found)
    tokenizer.add_tokens(added)
    return tokenizer, {key: _text(token) for key, token in named.items()}


def _config_tokens(config: dict[str, Any]) -> dict[int, Any]:
    return {int(id): token for id, token in (config.get("added_tokens_decoder") or {}).items()}


def _named(config: dict[str, Any]) -> dict[str, Any]:
    """The tokens that have a name of their own, as they are described."""
    named = {key: value for key, value in config.items() if key in _ROLES or (key.endswith("_token") and isinstance(value, str | dict))}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(more := config.get(key), dict):
            named |= more
    return {key: token for key, token in named.items() if token is not None}


def _extra(config: dict[str, Any]) -> list[Any]:
    """The special tokens without a name. ``additional_special_tokens`` is the older key."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return found if isinstance(found, list) else []


def _text(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"a special token is given as {str(token)[:60]}")
    return text


def _token(token: Any, *, special: bool = False) -> AddedToken:
    """A token from its text or its description. transformers' defaults: a special token is looked for in the text as it is."""
    flags = {key: bool(token[key]) for key in _FLAGS if key in token} if isinstance(token, dict) else {}
    special = flags.pop("special", special) or special
    return AddedToken(_text(token), special=special, **{"normalized": not special, **flags})


def _templates(root: Path, config: dict[str, Any]) -> dict[str, TemplateFile]:
    files = {DEFAULT: root / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((root / MORE_TEMPLATES).glob("*.jinja"))}
    found = {name: TemplateFile(source=regular(path).read_text("utf-8"), origin=str(path)) for name, path in files.items() if path.exists()}
    if found:
        return found
    for path, given in ((root / "tokenizer_config.json", config), (root / "chat_template.json", _read_json(root / "chat_template.json"))):
        if named := _named_templates(given.get("chat_template")):
            return {name: TemplateFile(source=source, origin=str(path)) for name, source in named.items()}
    return {}


def _named_templates(found: Any) -> dict[str, str]:
    """Templates by name: from one template, a list of ``{"name": ..., "template": ...}``, or an object."""
    if isinstance(found, str):
        return {DEFAULT: found} if found else {}
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if not isinstance(found, dict):
        return {}
    return {name: source for name, source in found.items() if isinstance(name, str) and isinstance(source, str)}
