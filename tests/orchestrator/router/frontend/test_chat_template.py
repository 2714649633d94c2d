"""Chat templates: the sandbox, what they are given, and that text never becomes a control token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from orchestrator.router.frontend.chat_template import ChatTemplate, PromptPiece, TemplateFile, TemplateSource
from orchestrator.router.frontend.tokenizer import load
from tests.support.tiny_models import CHAT_TEMPLATE, SPECIALS, tiny_tokenizer
from workers.protocol.errors import Rejected

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def template(source: str, **tokens: str) -> ChatTemplate:
    return named({"default": source}, **tokens)


def named(sources: dict[str, str], **tokens: str) -> ChatTemplate:
    files = {name: TemplateFile(source=source, origin=f"{name}.jinja") for name, source in sources.items()}
    return TemplateSource(templates=files, specials=SPECIALS, tokens=tokens).compile()


def text(pieces: list[PromptPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    loaded = load(str(folder))
    oracle = PreTrainedTokenizerFast.from_pretrained(str(folder))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "añ🙂\n x "}, {"role": "assistant", "content": "ok"}]
    expected = oracle.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert loaded.template is not None
    assert loaded.table.encode(loaded.template.compile().render(turns), False) == expected


@given(st.lists(st.sampled_from([*SPECIALS, "a", "\n", "\ufdd0", "\ufdd00\ufdd1", "<|im_", "end|>", "é"]), max_size=8))
def test_no_text_becomes_a_control_token(parts: list[str]) -> None:
    content = "".join(parts)
    pieces = template(CHAT_TEMPLATE).render([{"role": "user", "content": content}])
    assert text(pieces) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    if len(pieces) > 1:
        controls = [piece.text for piece in pieces if not piece.exact]
        assert controls == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    else:
        assert not any(special in content for special in SPECIALS)


def test_names_arguments_and_kwargs_are_masked_too() -> None:
    pieces = template("{{ messages[0].name }}{{ style }}{{ tools | tojson }}").render(
        [{"role": "user", "content": "", "name": "<|im_end|>"}],
        tools=[{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}],
        kwargs={"style": "<|endoftext|>"},
    )
    assert all(piece.exact for piece in pieces)
    assert text(pieces).startswith("<|im_end|><|endoftext|>[{") and "<|im_start|>" in text(pieces)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ lipsum.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ nothing.there }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_misbehaves_is_the_requests_end(source: str) -> None:
    with pytest.raises(Rejected) as caught:
        template(source).render(USER)
    assert caught.value.param == "messages"


def test_what_templates_are_given() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }};{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ {'a': '<é>'} | tojson }}{{ enable_thinking }}{{ tools is none }}"
    )
    messages = [{"role": "developer", "content": "x"}, *USER, *USER]
    assert text(template(source, bos_token="<s>").render(messages, kwargs={"enable_thinking": False})) == (
        '<s>system;user;4{"a": "<é>"}FalseTrue'
    )


def test_tool_arguments_arrive_as_objects() -> None:
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    source = "{{ tools | length }}{{ messages[0].tool_calls[0].function.arguments.x }}"
    assert text(template(source).render([{"role": "assistant", "tool_calls": [call]}], tools=TOOLS)) == "11"


def test_tools_join_the_system_turn_of_a_template_without_them() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    rendered = text(template(CHAT_TEMPLATE).render(messages, tools=TOOLS))
    assert rendered.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert rendered.count("<|im_start|>system") == 1 and '"name": "f"' in rendered
    assert text(template(CHAT_TEMPLATE).render(USER, tools=TOOLS)).startswith("<|im_start|>system\n# Tools")
