"""Prompts of many model families: the ids are those of transformers' ``apply_chat_template`` on the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.router.frontend.tokenizer import Loaded, load
from tests.support.chat_templates import FAMILIES, Family
from workers.protocol.errors import Rejected

USER = {"role": "user", "content": " What's 2 + 2?\n añ🙂 "}
SYSTEM = {"role": "system", "content": "Be <b>brief</b> & kind."}
ANSWER = {"role": "assistant", "content": "It is 4. "}
THOUGHT = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."}
CHANNEL = {"role": "assistant", "content": "<|channel>thought\nTwo and two.<channel|>It is 4."}
#: Key order, nested nulls and unknown keys as a client may send them.
TOOL: dict[str, Any] = {
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "required": ["b"],
            "properties": {"b": {"type": "integer", "default": None}, "a": {"type": "array"}},
        },
        "description": "Adds <é>.",
    },
    "type": "function",
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": [1, "é"], "c": {"d": None}}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "name": "add", "content": "4"}
REASONED = {"role": "assistant", "content": "It is 4.", "reasoning": "Two and two."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": " 2 + 2"}]}
PHI_TOOLS = {"role": "system", "content": "s", "tools": '[{"name": "add"}]'}

#: Conversations for every template; where transformers refuses one, so must we.
PLAIN = {
    "user": [USER],
    "system": [SYSTEM, USER, ANSWER, USER],
    "thought": [USER, THOUGHT, USER],
    "channel": [USER, CHANNEL, USER],
    "last thought": [USER, THOUGHT],
    "reasoning key": [USER, REASONED, USER],
    "own keys": [PHI_TOOLS, USER],
    "odd roles": [USER, USER],
    "null keys": [USER, ANSWER | {"tool_calls": None, "refusal": None, "function_call": None, "name": None}, USER],
}
TOOLS = {
    "tools": [USER],
    "calls": [USER, CALLS, RESULT, ANSWER, USER],
    "last call": [USER, CALLS, RESULT],
    "system": [SYSTEM, USER, CALLS, RESULT],
}
KWARGS: list[dict[str, Any]] = [
    {"enable_thinking": False},
    {"thinking": True, "date_string": "1 Jan", "reasoning_effort": "high"},
    {"documents": [{"title": "A", "text": "b"}, {"title": "C", "text": "d"}]},
    {"bos_token": "x", "pad_token": "y"},
]


def folder_of(family: Family, folder: Path) -> Path:
    """A tokenizer folder: every byte a token, and the family's own ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(family.specials))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in family.added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    config["pad_token"] = family.specials[-1]
    if isinstance(family.source, str):
        config["chat_template"] = family.source
    else:
        config["chat_template"] = [{"name": name, "template": source} for name, source in family.source.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def as_client(message: dict[str, Any]) -> dict[str, Any]:
    """The message as the OpenAI API has it: arguments as JSON text."""
    if not (calls := message.get("tool_calls")):
        return message
    texts = [{**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}} for call in calls]
    return {**message, "tool_calls": texts}


class Pair:
    """Our tokenizer and transformers', on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.loaded: Loaded = load(str(folder))
        self.oracle = PreTrainedTokenizerFast.from_pretrained(str(folder))
        assert self.loaded.template is not None
        self.template = self.loaded.template.compile()

    def ours(self, messages: list[dict[str, Any]], **given: Any) -> list[int] | None:
        """None: refused."""
        try:
            pieces = self.template.render([as_client(message) for message in messages], **given)
        except Rejected:
            return None
        return self.loaded.table.encode(pieces, False)

    def theirs(self, messages: list[dict[str, Any]], **given: Any) -> list[int] | None:
        kwargs = {"add_generation_prompt": True, **given, **given.pop("kwargs", {})}
        try:
            found: list[int] = self.oracle.apply_chat_template(messages, return_dict=False, **kwargs)
        except Exception:  # a template's own exception, or any that jinja lets through
            return None
        return found

    def check(self, label: object, messages: list[dict[str, Any]], **given: Any) -> bool:
        """Whether the conversation was taken. Fails where transformers says otherwise."""
        ours, theirs = self.ours(messages, **given), self.theirs(messages, **given)
        if ours != theirs:
            texts = [ids if ids is None else self.oracle.decode(ids) for ids in (ours, theirs)]
            pytest.fail(f"{label} {given}\nours:\n{texts[0]}\ntransformers:\n{texts[1]}")
        return ours is not None


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pair]:
    return request.param, Pair(folder_of(FAMILIES[request.param], tmp_path_factory.mktemp("family")))


def parts_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every text as a list of one part, as transformers wants it where a template reads parts only."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m for m in messages]


def test_plain_conversations(pair: tuple[str, Pair]) -> None:
    name, both = pair
    for label, messages in PLAIN.items():
        if name in ("llama_guard", "smolvlm", "llava"):  # transformers takes parts only; a client sends either
            assert both.ours(messages) == both.theirs(parts_of(messages)), label
            assert both.ours(parts_of(messages)) == both.theirs(parts_of(messages)), label
        else:
            both.check(label, messages)
            both.check(label, messages, add_generation_prompt=False)
    assert both.ours(PLAIN["user"]) is not None


def test_parts(pair: tuple[str, Pair]) -> None:
    """A list of parts: as transformers renders it where the template reads parts, else joined by lines as vLLM joins it."""
    name, both = pair
    if name in ("llama_guard", "smolvlm", "llava", "qwen_vl", "gemma3", "gemma4", "mistral_small31", "glm"):
        assert both.check("parts", [PARTS])
        return
    joined = {"role": "user", "content": "Look: \n 2 + 2"}
    assert both.ours([PARTS]) == both.theirs([joined]) is not None


def test_control_tokens_in_a_users_text_are_text(pair: tuple[str, Pair]) -> None:
    """transformers has a switch for it. In the tests' tokenizer a byte is a token, so the cuts between plain texts change no id."""
    name, both = pair
    if name == "features":
        return  # it rewrites the text, and transformers shows it the mark
    wrap = parts_of if name in ("llama_guard", "smolvlm", "llava") else list
    marks = FAMILIES[name].specials
    for text in (f"a {marks[-1]} b", "".join(marks), f"{marks[0]}\n{marks[-1]}x"):
        messages = wrap([{"role": "user", "content": text}])
        assert both.ours(messages) == both.theirs(messages, sanitize_control_tokens=True) is not None


def test_tools(pair: tuple[str, Pair]) -> None:
    name, both = pair
    if FAMILIES[name].tools:
        for label, messages in TOOLS.items():
            both.check(label, messages, tools=[TOOL])
        assert both.ours(TOOLS["calls"], tools=[TOOL]) is not None


def test_arguments_of_the_template(pair: tuple[str, Pair]) -> None:
    name, both = pair
    wrap = parts_of if name in ("llama_guard", "smolvlm", "llava") else list
    for kwargs in KWARGS:
        assert both.check("kwargs", wrap([USER]), kwargs=kwargs)


def test_the_last_message_is_continued(pair: tuple[str, Pair]) -> None:
    name, both = pair
    wrap = parts_of if name in ("llama_guard", "smolvlm", "llava") else list
    for content in ("It is", "It is  \n", " It", "a CONTINUE_FINAL_MESSAGE_TAG b", "<think>\nTwo", THOUGHT["content"]):
        messages = wrap([USER, {"role": "assistant", "content": content}])
        taken = both.check(content, messages, continue_final_message=True, add_generation_prompt=False)
        assert taken or name == "features" or content == THOUGHT["content"]  # features: a template that changes the text
    both.check("user", wrap([USER]), continue_final_message=True, add_generation_prompt=False)
