"""Types of chat messages and tools, shared by the request's checks, the chat templates and the tool parsers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: ToolFunction


class ToolName(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: ToolName


class ToolRules(msgspec.Struct, frozen=True, kw_only=True):
    """How a request lets its output call tools. ``names``: the tools. ``named``: the one function that must be called; then the whole
    output is its arguments. ``required``: the output must be calls of any of the tools."""

    names: frozenset[str]
    named: str | None = None
    required: bool = False


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a chat. ``content`` in parts is joined by newlines. There are text parts only: this router fetches nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)
