"""Messages as one chat template expects them: the forms of contents and arguments, and tools where the template has no place for them.

Owns the form only: the result is made of plain dicts, lists and strings, in the order in which the client sent their keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from orchestrator.router.frontend.template_reads import TemplateReads

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
#: The keys that carry a turn's reasoning; the first is what templates read. transformers' names.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


#: How a template is given contents: as texts, as :class:`TextOrParts`, or as lists of parts.
ContentForm = Literal["text", "either", "parts"]


class TextOrParts(str):
    """A content for a template that reads parts without asking for their form: a text wherever a text is wanted, and a list of parts where
    the template loops over it or takes an item. So a template may read one role's content as text and another's as parts."""

    def __new__(cls, parts: list[dict[str, Any]]) -> TextOrParts:
        found = super().__new__(cls, join(parts))
        found._parts = parts
        return found

    _parts: list[dict[str, Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)

    def __getitem__(self, key: Any) -> Any:
        return self._parts[key] if isinstance(key, int) else super().__getitem__(key)


def join(parts: list[dict[str, Any]]) -> str:
    """The text of all parts, as vLLM joins them."""
    return "\n".join(part["text"] for part in parts)


def text_parts(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked parts of a message, every one as a text part."""
    return [{"type": "text", "text": part["refusal"] if part["type"] == "refusal" else part["text"]} for part in content]


def content_in(form: ContentForm, content: Any, *, shape: bool) -> Any:
    """A content (text or text parts) in ``form``. ``shape``: the template asks whether a content is a string or a list."""
    if isinstance(content, list):
        if form == "text":
            return join(content)
        return content if shape or form == "parts" else TextOrParts(content)
    if isinstance(content, str) and form != "text":
        parts = [{"type": "text", "text": content}]
        return parts if form == "parts" else TextOrParts(parts)
    return content


def turns_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]], reads: TemplateReads) -> list[dict[str, Any]]:
    """Checked messages with every form settled but that of their contents, which are a text or a list of text parts."""
    turns = [_turn(message, reads) for message in messages]
    if not reads.tools and not reads.tool_calls:
        turns = [_spell_out(turn) for turn in turns]
    return _list_tools(turns, tools) if tools and not reads.tools else turns


def _turn(message: dict[str, Any], reads: TemplateReads) -> dict[str, Any]:
    # A template that is given null prints "None"; a key that is not there, it skips. transformers drops nulls too.
    turn = {key: value for key, value in message.items() if value is not None}
    if isinstance(turn.get("content"), list):
        turn["content"] = text_parts(turn["content"])
    if turn["role"] == "developer" and not reads.developer:
        turn["role"] = "system"
    if turn["role"] == "function":
        turn["role"] = "tool"
    if turn["role"] == "assistant":
        turn = _assistant(turn, reads)
    reasoning = next((turn[key] for key in REASONING_KEYS if key in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _assistant(turn: dict[str, Any], reads: TemplateReads) -> dict[str, Any]:
    if (legacy := turn.pop("function_call", None)) and not turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": legacy}]
    if calls := turn.pop("tool_calls", None):
        turn["tool_calls"] = [_call(call, reads) for call in calls]
        if "content" not in turn and reads.null:
            turn["content"] = None
    elif "content" not in turn:
        turn["content"] = turn.get("refusal", "")
    return turn


def _call(call: dict[str, Any], reads: TemplateReads) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    given = function.get("arguments")
    arguments: Any = given
    if reads.arguments_as_text:
        arguments = given if isinstance(given, str) else to_json(given or {})
    elif not isinstance(given, dict):
        arguments = _object(given)
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: Any) -> dict[str, Any]:
    """The object in a JSON text; an empty one where a model wrote something else, as a later turn must not fail for it."""
    try:
        found = msgspec.json.decode(text) if isinstance(text, str) else None
    except (msgspec.DecodeError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """The filter ``tojson`` of templates: the spacing of Python's json, and none of jinja's HTML escaping."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _spell_out(turn: dict[str, Any]) -> dict[str, Any]:
    """Tool calls and answers as message text, in the spelling that tool-trained models share, for a template without tools."""
    content = turn.get("content") or ""
    text = join(content) if isinstance(content, list) else content
    if calls := turn.get("tool_calls"):
        written = [f"<tool_call>\n{to_json(call.get('function', {}))}\n</tool_call>" for call in calls]
        return {"role": "assistant", "content": "\n".join(filter(None, [text, *written]))}
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    return turn


def _list_tools(turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The signatures of the tools as text of the system turn."""
    listing = _TOOLS_HEAD + "".join("\n" + to_json(tool) for tool in tools) + _TOOLS_TAIL
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": listing}, *turns]
    content = turns[0]["content"]
    text = join(content) if isinstance(content, list) else content
    return [{**turns[0], "content": f"{text}\n\n{listing}"}, *turns[1:]]
