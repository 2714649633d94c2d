"""Where a folder's special tokens and chat templates can stand: tokens, ids and templates are those of transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.tokenizer import load
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from workers.protocol.errors import ArtifactError

TEXTS = ["<new>", "a<new>b <other> c", " <other><|im_end|>\n<new> x", "<|im_start|>user\n<other>", "<bos>é<eos> <new>", "<plain> <x>"]
FULL = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
STRIPS = {**FULL, "lstrip": True, "rstrip": True}

#: File (or key of tokenizer_config.json) -> content.
PLACES: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {"added_tokens_decoder": {"259": {"content": "<new>", **FULL}, "260": {"content": "<other>", **STRIPS}}},
    "not special there": {
        "added_tokens_decoder": {"259": {"content": "<new>", **FULL, "special": False}, "260": {"content": "<other>", **FULL}}
    },
    "other flags there": {"added_tokens_decoder": {"258": {"content": "<|im_end|>", **STRIPS}, "259": {"content": "<new>", **FULL}}},
    "added_tokens.json": {"added_tokens.json": {"<other>": 260, "<new>": 259}},
    "added_tokens.json, special by name": {"added_tokens.json": {"<new>": 259, "<eos>": 260}, "eos_token": "<eos>"},
    "another id than the next": {"added_tokens_decoder": {"400": {"content": "<new>", **FULL}}},
    "both": {"added_tokens.json": {"<other>": 260}, "added_tokens_decoder": {"259": {"content": "<new>", **FULL}}},
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": "<eos>", "bos_token": {"content": "<bos>", **STRIPS}}},
    "extra in the map": {"special_tokens_map.json": {"additional_special_tokens": ["<new>", "<other>"]}},
    "map and added": {"special_tokens_map.json": {"eos_token": "<eos>"}, "added_tokens.json": {"<new>": 259, "<eos>": 260}},
    "map beside a decoder": {
        "special_tokens_map.json": {"additional_special_tokens": ["<new>"]},
        "added_tokens_decoder": {"259": {"content": "<other>", **FULL}},
    },
    "additional_special_tokens": {"additional_special_tokens": ["<new>", "<other>"]},
    "extra_special_tokens": {"extra_special_tokens": ["<new>", "<other>"]},
    "both extras": {"extra_special_tokens": ["<new>"], "additional_special_tokens": ["<other>"]},
    "extra_special_tokens by name": {"extra_special_tokens": {"image_token": "<new>", "audio_token": "<other>"}},
    "a model's own key": {"image_token": "<new>", "boi_token": "<other>"},
    "named, described": {"eos_token": {"__type": "AddedToken", "content": "<eos>", **STRIPS}, "cls_token": "<new>"},
    "named, plain": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": None, "sep_token": "<other>"},
    "named and described elsewhere": {
        "eos_token": "<eos>",
        "added_tokens_decoder": {"259": {"content": "<eos>", **FULL, "special": False}},
    },
}


def folder_with(folder: Path, content: dict[str, Any]) -> Path:
    tiny_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name, value in content.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(value))
        else:
            config[name] = value
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_special_tokens_are_found_wherever_they_stand(tmp_path: Path, place: str) -> None:
    folder = folder_with(tmp_path, PLACES[place])
    ours, theirs = load(str(folder)), PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokens = theirs.added_tokens_decoder
    assert ours.table.specials == {token.content: id for id, token in tokens.items() if token.special}
    assert ours.template is not None and ours.template.tokens == theirs.special_tokens_map
    for text in TEXTS:
        assert ours.table.encode([PromptPiece(text, False)], False) == theirs.encode(text, add_special_tokens=False), text
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.table.join(ids).decode() == theirs.decode(ids, skip_special_tokens=True)


def test_tokens_that_are_dicts_in_a_list(tmp_path: Path) -> None:
    """transformers 4 wrote them so; transformers 5 cannot read them."""
    found = load(str(folder_with(tmp_path, {"special_tokens_map.json": {"additional_special_tokens": [{"content": "<new>", **FULL}]}})))
    assert found.table.specials["<new>"] == 259


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_plain_text_behind_a_control_token_has_no_blank_of_its_own(tmp_path: Path, scheme: str) -> None:
    """SentencePiece-like tokenizers; transformers' switch that keeps marks of users as text is the oracle."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{{ '<s>' }}{% for m in messages %}{{ '[INST]' + m.content + '</s>' }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load(str(tmp_path)), PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.template is not None
    for text in ("hi", " a </s> b", "a\n[INST]\n"):
        messages = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
        assert ours.table.encode(ours.template.compile().render(messages), False) == expected


LIST = [{"name": "default", "template": "D{{ messages[0].content }}"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
TEMPLATES: dict[str, dict[str, Any]] = {
    "one in the config": {"chat_template": CHAT_TEMPLATE},
    "a list in the config": {"chat_template": LIST},
    "a file": {"chat_template": "C", "chat_template.jinja": "F{{ messages[0].content }}"},
    "a file and a folder": {
        "chat_template": "C",
        "chat_template.jinja": "F",
        "additional_chat_templates/tool_use.jinja": "T{{ tools[0].function.name }}",
    },
    "a list and a folder": {"chat_template": LIST, "chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"},
}


@pytest.mark.parametrize("place", TEMPLATES)
def test_templates_are_found_wherever_they_stand(tmp_path: Path, place: str) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    content = TEMPLATES[place]
    for name in [name for name in content if name.endswith(".jinja")]:
        (tmp_path / name).write_text(content[name])
    folder = folder_with(tmp_path, {name: value for name, value in content.items() if not name.endswith(".jinja")})
    ours, theirs = load(str(folder)), PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert ours.template is not None
    compiled = ours.template.compile()
    for tools in (None, [{"type": "function", "function": {"name": "add"}}]):
        messages = [{"role": "user", "content": "hi"}]
        if tools and "tool" not in str(content):
            continue  # a template without tools gets them as text, which transformers leaves out
        shown = "".join(piece.text for piece in compiled.render(messages, tools=tools, add_generation_prompt=False))
        assert shown == theirs.apply_chat_template(messages, tools=tools, tokenize=False)


def test_a_processors_template_is_the_last_choice(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"chat_template": None, "chat_template.json": {"chat_template": "P"}})
    found = load(str(folder)).template
    assert found is not None and found.templates["default"].source == "P"
    folder_with(folder, {"chat_template": "C"})
    found = load(str(folder)).template
    assert found is not None and found.templates["default"].source == "C"


def test_an_operators_template_replaces_all_others(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("O{{ messages[0].content }}")
    folder = folder_with(tmp_path / "m", {"chat_template": LIST})
    found = load(str(folder), str(file)).template
    assert found is not None and list(found.templates) == ["default"] and found.templates["default"].origin == str(file)
    with pytest.raises(ArtifactError, match=r"none\.jinja"):
        load(str(folder), str(tmp_path / "none.jinja"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="no text"):
        load(str(folder), str(file))


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens_decoder": {"x": {"content": "<new>"}}},
        {"added_tokens_decoder": {"259": {"content": 7}}},
        {"added_tokens.json": ["<new>"]},
        {"extra_special_tokens": [7]},
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"damaged|does not make sense"):
        load(str(folder_with(tmp_path, content)))
