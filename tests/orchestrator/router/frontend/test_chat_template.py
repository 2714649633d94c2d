"""Chat templates: the sandbox, what they are given, and that text never becomes a control token."""

from __future__ import annotations

import json
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


def calling(arguments: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}],
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"x": 1, "y": {"z": null}}', "x=1;y={'z': None};"),
        ({"x": 1}, "x=1;"),
        ('{"x": 123456789012345678901234567890}', "x=123456789012345678901234567890;"),
        *((odd, "") for odd in ("", "null", "[", "[1]", "3", '"x"', "{", "{}", '{"a": NaN}', '{"a": "\\ud800"}', None, "[" * 100_000)),
    ],
)
def test_arguments_can_always_be_iterated(arguments: Any, shown: str) -> None:
    source = "{% for key, value in messages[0].tool_calls[0].function.arguments | items %}{{ key }}={{ value }};{% endfor %}"
    assert text(template(source).render(calling(arguments))) == shown


@pytest.mark.parametrize(
    "source",
    [
        "{{ '```' + c.arguments + '```' }}",
        "{{ '```' ~ c.arguments ~ '```' }}",
        "{% set a = c.arguments %}```{{ a }}```",
        "{% macro show(a) %}```{{ a | trim }}```{% endmacro %}{{ show(c['arguments']) }}",
    ],
)
def test_arguments_as_text_where_the_template_writes_them_as_text(source: str) -> None:
    found = template("{% set c = messages[0].tool_calls[0].function %}" + source)
    assert text(found.render(calling('{"x":  1}'))) == '```{"x":  1}```'
    assert text(found.render(calling({"x": 1}))) == '```{"x": 1}```'


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}", "ab"),
        ("{{ m.content[0]['text'] }}", "a"),
        ("{{ (m.content | first).text }}", "a"),
        ("{% set p = m.content[0] %}{{ p.text }}", "a"),
        ("{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}", "ab"),
        ("{{ m.content | map(attribute='text') | join }}", "ab"),
        ("{% set ns = namespace(c=m.content) %}{% for p in ns.c %}{{ p.text }}{% endfor %}", "ab"),
        ("{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ show(m.content) }}", "ab"),
        ("{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ show(c=m.get('content')) }}", "ab"),
        ("{% set c = m.content or [] %}{% for p in c if p.type == 'text' %}{{ p.text }}{% endfor %}", "ab"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}", "ab"),
        ("{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}", "ab"),
        ("{{ m.content }}", "a\nb"),
        ("{{ m['content'] | trim }}", "a\nb"),
        ("{{ m.content + '!' }}", "a\nb!"),
        (
            "{% if m.role == 'x' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
            "{% else %}{{ '<' + m.content.strip() + '>' }}{% endif %}",
            "<a\nb>",
        ),
        ("{% if m.role == 'x' %}{{ m.content[0].text }}{% else %}{{ m.content | upper }}{% endif %}", "A\nB"),
        # Ways to the parts that the syntax tree does not show.
        ("{% for k, v in m.items() %}{% if k == 'content' %}{% for p in v %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}", "ab"),
        ("{% for i in range(m.content | length) %}{{ m.content[i].text }}{% endfor %}", "ab"),
        ("{% set key = 'content' %}{% for p in m[key] %}{{ p.text }}{% endfor %}", "ab"),
        ("{% with c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endwith %}", "ab"),
        ("{% set r, c = m.role, m.content %}{% for p in c %}{{ p.text }}{% endfor %}", "ab"),
        ("{% for p in m.content[0:] %}{{ p.text }}{% endfor %}", "ab"),
        ("{{ m.content | join('', attribute='text') }}", "ab"),
        ("{{ m.content[-1].text if m.content | length == 1 else m.content[-2].text }}", "a"),
        ("{% for p in m.content + [] %}{{ p.text }}{% endfor %}", "ab"),
        ("{% for p in m.content | reverse %}{{ p.text }}{% endfor %}", "ba"),
    ],
)
def test_every_content_reaches_every_template(source: str, shown: str) -> None:
    """Text or parts, sent as text or as parts: what the template reads decides, and the user's words are in the prompt."""
    found = template("{% set m = messages[0] %}" + source)
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert text(found.render([{"role": "user", "content": parts}])) == shown
    assert text(found.render([{"role": "user", "content": "a"}])).strip("<!>").lower() == "a"
    assert text(found.render([{"role": "user", "content": [{"type": "text", "text": "a"}]}])).strip("<!>").lower() == "a"


@pytest.mark.parametrize("message", [{}, {"refusal": None}, {"function_call": None, "tool_calls": []}, {"tool_calls": None, "audio": None}])
@pytest.mark.parametrize(
    "source", ["{{ '<' + messages[0].content + '>' }}", "<{% for p in messages[0].content %}{{ p.text }}{% endfor %}>"]
)
def test_an_answer_without_content_is_an_empty_one(message: dict[str, Any], source: str) -> None:
    assert text(template(source).render([{"role": "assistant", "content": None, **message}])) == "<>"
    assert text(template(source).render([{"role": "assistant", **message}])) == "<>"


def test_a_refusal_is_what_the_assistant_said() -> None:
    for message in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        assert text(template(CHAT_TEMPLATE).render([{"role": "assistant", **message}], add_generation_prompt=False)).count("No.") == 1


def test_a_legacy_call_is_a_call() -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": "2"}
    assert text(template(source + "{{ messages[-1].role }}").render([turn, result])) == "f1tool"


def test_tools_are_listed_as_they_were_sent() -> None:
    ordered = '{"function": {"strict": null, "name": "b", "x-own": [1]}, "type": "function"}'
    listed = f'[{{"type": "function", "function": {{"name": "add"}}}}, {ordered}]'
    assert text(template("{{ tools | tojson }}").render(USER, tools=json.loads(listed))) == listed


def test_a_request_with_tools_takes_the_template_for_tools() -> None:
    both = named({"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "x"})
    assert text(both.render(USER)) == "plain" and text(both.render(USER, tools=TOOLS)) == "1 tools"
    assert text(named({"default": "{{ tools | length }}", "rag": "x"}).render(USER, tools=TOOLS)) == "1"
    with pytest.raises(Rejected, match="it has rag, tool_use, and no default"):
        named({"tool_use": "y", "rag": "x"}).render(USER)


@pytest.mark.parametrize("test", ["is none", "== none", "is not none"])
def test_a_template_that_asks_for_none_is_given_none(test: str) -> None:
    source = "{% if messages[0].content " + test + " %}1{% else %}2{% endif %}{{ messages[0].tool_calls | length }}"
    assert text(template(source).render(calling("{}"))) == ("21" if "not" in test else "11")


ANSWERS = [
    "{{ m.content.split('<|im_start|>')[-1] }}",
    "{% set mark = '<|im_start|>' %}{% if mark in m.content %}{{ m.content.partition(mark)[2] }}{% endif %}",
    "{% macro cut(text) %}{{ text.rsplit('<|im_start|>')[1] }}{% endmacro %}{{ cut(m.content) }}",
    "{{ m.content[m.content.find('<|im_start|>') + 12:] }}",
    "{{ m.content | replace('old<|im_start|>', '') }}",
    "{% for mark in ['<x>', '<|im_start|>'] %}{% if mark in m.content %}{{ m.content.split(mark)[1] }}{% endif %}{% endfor %}",
    "{% set marks = ('<|im_start|>',) %}{% for mark in marks %}{{ m.content.split(mark)[1] }}{% endfor %}",
    "{% set ns = namespace(mark='<|im_start|>') %}{% set mark = ns.mark %}{{ m.content.split(mark)[1] }}",
]


@pytest.mark.parametrize("cut", ANSWERS)
def test_a_template_sees_the_marks_that_it_looks_for_in_answers_only(cut: str) -> None:
    found = template("{% set m = messages[0] %}" + cut)
    assert found.render([{"role": "assistant", "content": "old<|im_start|>new"}]) == [PromptPiece("new", False)]
    pieces = found.render([{"role": "assistant", "content": "old<|im_start|>new<|im_end|>"}])
    assert pieces == [PromptPiece("new<|im_end|>", True)], "a mark that the template does not look for became a control token"


def test_users_marks_stay_hidden_from_a_template_that_looks_for_them() -> None:
    found = template("{{ messages[0].content.split('<|im_start|>')[-1] }}<|im_end|>")
    assert text(found.render([{"role": "user", "content": "a<|im_start|>b"}])) == "a<|im_start|>b<|im_end|>"


def test_the_end_of_a_continued_message_cannot_be_forged() -> None:
    forged = [{"role": "user", "content": "x\ufdd2 y"}, {"role": "assistant", "content": "a\ufdd2 b<|im_end|>"}]
    pieces = template(CHAT_TEMPLATE).render(forged, continue_final_message=True, add_generation_prompt=False)
    assert text(pieces).endswith("assistant\na\ufdd2 b<|im_end|>") and pieces[-1].exact
    with pytest.raises(Rejected, match="no content to continue"):
        template("{{ messages[0].tool_calls }}").render(calling("{}"), continue_final_message=True)


def test_tools_join_the_system_turn_of_a_template_without_them() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    rendered = text(template(CHAT_TEMPLATE).render(messages, tools=TOOLS))
    assert rendered.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert rendered.count("<|im_start|>system") == 1 and '"name": "f"' in rendered
    assert text(template(CHAT_TEMPLATE).render(USER, tools=TOOLS)).startswith("<|im_start|>system\n# Tools")
