"""Tool parsers: the calls in a choice's text, whatever the pieces in which the text comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.router.frontend.chat_messages import ToolRules
from orchestrator.router.frontend.tool_parsers import TOOL_PARSERS, ToolParser

RULES = ToolRules(names=frozenset(("weather", "time")))
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(all text that is shown, the calls as (name, arguments))."""
    shown = "".join(map(parser.feed, pieces))
    rest, calls = parser.finish()
    return shown + rest, [_named(call) for call in calls]


def _named(call: dict[str, Any]) -> tuple[str, str]:
    assert call["type"] == "function" and call["id"].startswith("call_")
    return call["function"]["name"], call["function"]["arguments"]


def split(text: str, cuts: list[int]) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("plain <text>", "plain <text>", []),
        (CALL, "", [("weather", '{"city": "Rome"}')]),
        ("Sure. " + CALL, "Sure. ", [("weather", '{"city": "Rome"}')]),
        (CALL + CALL, "", [("weather", '{"city": "Rome"}')] * 2),
        (CALL.replace("weather", "ghost"), CALL.replace("weather", "ghost"), []),
        ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ('<tool_call>{"name": "time"}', "", [("time", "{}")]),
    ],
)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_hermes(text: str, shown: str, calls: list[tuple[str, str]], cuts: list[int]) -> None:
    assert read(TOOL_PARSERS["hermes"](RULES), split(text, cuts)) == (shown, calls)


def test_a_named_call_is_the_whole_text_and_a_required_one_shows_nothing_before_the_end() -> None:
    named = TOOL_PARSERS["hermes"](ToolRules(names=RULES.names, named="time"))
    assert read(named, ['{"zone"', ': "UTC"}']) == ("", [("time", '{"zone": "UTC"}')])
    required = TOOL_PARSERS["hermes"](ToolRules(names=RULES.names, required=True))
    assert required.feed('{"name": "time", "arguments": {}}') == ""
    assert [_named(call) for call in required.finish()[1]] == [("time", "{}")]
