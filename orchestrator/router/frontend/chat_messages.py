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
    """``sent``: the tool as the client sent it, which is what a chat template is given: no key more, no key less, in the client's order."""

    type: Literal["function"]
    function: ToolFunction
    sent: dict[str, Any]


class ToolName(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: ToolName


class ToolRules(msgspec.Struct, frozen=True, kw_only=True):
    """How a request lets its output call tools. ``names``: the tools. ``named``: the one function that must be called; then the whole
    output is its arguments. ``required``: the output must be one call of any of the tools. ``parallel``: there may be several calls."""

    names: frozenset[str]
    named: str | None = None
    required: bool = False
    parallel: bool = True


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message. ``type``: one of :data:`TEXT_PARTS`, whose text is in ``text``, or ``refusal``, whose text is in ``refusal``.
    Parts of other types are refused by name: this router fetches nothing, and its models read text."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether the part holds the text that its type promises."""
        return (self.text if self.type in TEXT_PARTS else self.refusal) is not None


#: Types of text parts: of chats, and those of the Responses API, which clients mix into chats.
TEXT_PARTS = ("text", "input_text", "output_text")
PART_TYPES = (*TEXT_PARTS, "refusal")


class LegacyCall(msgspec.Struct, frozen=True, kw_only=True):
    """An assistant's call in the form before tools."""

    name: str
    arguments: str = ""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a chat, as it is checked. ``sent``: the message as the client sent it, which is what a chat template is given, because
    templates read keys that only their model has. The role ``function`` is that of ``tool`` in the form before tools."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: LegacyCall | None = None
    sent: dict[str, Any]

    @property
    def text(self) -> str:
        """The text of the content; that of its parts, joined by newlines."""
        if isinstance(self.content, list):
            return "\n".join((part.text or part.refusal or "") for part in self.content)
        return self.content or ""
