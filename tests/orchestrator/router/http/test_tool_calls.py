"""Tool calls over HTTP: a stream and a whole answer say the same, and a stream says it as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_router import Play, ServedDoor

CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
NAMED = {"type": "function", "function": {"name": "f"}}
ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>'
TWO = f'First {ONE}\n<tool_call>\n{{"name": "g", "parameters": {{"y": [1, 2]}}}}\n</tool_call>\nDone.'
BROKEN = '<tool_call>{"name": "f", "arguments": {"x": ]}</tool_call>'


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(Path(tmp_path_factory.mktemp("door"))) as door:
        yield door


def ask(door: ServedDoor, play: Play, **fields: Any) -> Any:
    door.dispatcher.script = lambda ask, choice: play
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, **fields}
    answer = door.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def whole(door: ServedDoor, play: Play, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = ask(door, play, **fields).json()["choices"][0]
    return found


def chunks(door: ServedDoor, play: Play, **fields: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in ask(door, play, stream=True, **fields).text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def joined(found: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]], str]:
    """(content, the calls as (name, arguments), finish reason) that a client puts together."""
    content, calls, reason = "", {}, ""
    for chunk in found:
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", ()):
                name, arguments = calls.get(call["index"], ("", ""))
                calls[call["index"]] = (name + call["function"].get("name", ""), arguments + call["function"]["arguments"])
                assert ("id" in call) == ("type" in call) == (not name)
    return content, list(calls.values()), reason


@pytest.mark.parametrize("burst", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "fields", "content", "calls", "reason"),
    [
        (ONE, {}, "", [("f", '{"x": "</tool_call>"}')], "tool_calls"),
        (TWO, {}, "First \nDone.", [("f", '{"x": "</tool_call>"}'), ("g", '{"y": [1, 2]}')], "tool_calls"),
        (TWO, {"parallel_tool_calls": False}, "First \nDone.", [("f", '{"x": "</tool_call>"}')], "tool_calls"),
        ("<tool_call>oops", {}, "<tool_call>oops", [], "stop"),
        ('{"x": 1}', {"tool_choice": NAMED}, "", [("f", '{"x": 1}')], "tool_calls"),
        ('{"name": "g", "arguments": {"x": 1}}', {"tool_choice": "required"}, "", [("g", '{"x": 1}')], "tool_calls"),
        (ONE, {"max_tokens": 52}, "", [("f", '{"x": "</tool')], "length"),
        (ONE, {"tool_choice": "none"}, ONE, [], "stop"),
    ],
)
def test_a_stream_and_a_whole_answer_say_the_same(
    door: ServedDoor, text: str, fields: dict[str, Any], content: str, calls: list[tuple[str, str]], reason: str, burst: int
) -> None:
    play = Play(text=text, burst=burst)
    assert joined(chunks(door, play, **fields)) == (content, calls, reason)
    found = whole(door, play, **fields)
    assert ((found["message"]["content"] or ""), found["finish_reason"]) == (content, reason)
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in found["message"].get("tool_calls", [])] == calls


def test_arguments_come_token_by_token_with_usage_and_logprobs(door: ServedDoor) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(door, Play(text=ONE), stream_options=options, logprobs=True)
    last = found.pop()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(ONE)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts) and counts[-1] == len(ONE), "usage stands in every chunk"
    positions = [chunk["usage"]["completion_tokens"] for chunk in found if "tool_calls" in chunk["choices"][0]["delta"]]
    assert positions[0] == ONE.index('", ') + 1, "the call begins with the token that ends its name"
    arguments = '{"x": "</tool_call>"}'
    assert positions[1:] == [ONE.index(arguments) + at for at in range(1, len(arguments) + 1)]
    scored = [entry["token"] for chunk in found if (logprobs := chunk["choices"][0]["logprobs"]) for entry in logprobs["content"]]
    assert "".join(scored) == ONE, "every token's logprobs, once"


def test_a_broken_call_is_text_and_no_call(door: ServedDoor) -> None:
    """A stream has shown the beginning of the call, which it cannot take back; the text is whole in both."""
    found = whole(door, Play(text="Hm. " + BROKEN + ONE))
    assert found["message"]["content"] == "Hm. " + BROKEN and len(found["message"]["tool_calls"]) == 1
    content, calls, reason = joined(chunks(door, Play(text="Hm. " + BROKEN + ONE)))
    assert (content, calls[-1], reason) == ("Hm. " + BROKEN, ("f", '{"x": "</tool_call>"}'), "tool_calls")
    assert joined(chunks(door, Play(text=BROKEN)))[::2] == (BROKEN, "stop")
    assert "tool_calls" not in whole(door, Play(text=BROKEN))["message"]
