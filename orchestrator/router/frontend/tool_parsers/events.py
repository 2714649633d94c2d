"""What a parser of tool calls is, and what it makes of the text of a choice: text to show, and calls piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import msgspec


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Text that is no part of a call."""

    text: str


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of call number ``index`` of the choice. The first piece has ``id`` and ``name``; the ``arguments`` of all pieces together are
    the JSON text of the call's arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def json(self) -> dict[str, Any]:
        """An entry of OpenAI's ``delta.tool_calls``."""
        if not self.id:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class CallDropped(msgspec.Struct, frozen=True, kw_only=True):
    """Call number ``index`` turned out to be none. Its text follows as :class:`TextDelta`; a stream cannot take back its pieces."""

    index: int


ToolEvent: TypeAlias = TextDelta | CallDelta | CallDropped


class ChoiceParser(Protocol):
    """The parser of one choice: :meth:`feed` for each piece of its text, then :meth:`finish` once. The pieces may be cut anywhere, which
    changes where the events are cut and nothing else."""

    def feed(self, text: str) -> list[ToolEvent]:
        """What is now known: text to be shown, pieces of calls."""

    def finish(self, *, cut: bool) -> list[ToolEvent]:
        """The rest. ``cut``: the output ended at its length, so a call that is out stays, as far as it came."""


def new_call(index: int, name: str) -> CallDelta:
    return CallDelta(index=index, id=f"call_{secrets.token_hex(12)}", name=name)


def whole(events: Iterable[ToolEvent]) -> tuple[str, list[dict[str, Any]]]:
    """(the text, the calls as OpenAI's ``message.tool_calls``) that all ``events`` of a choice make together."""
    texts: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, TextDelta):
            texts.append(event.text)
        elif isinstance(event, CallDropped):
            del calls[event.index]
        elif event.id:
            function = {"name": event.name, "arguments": event.arguments}
            calls[event.index] = {"id": event.id, "type": "function", "function": function}
        else:
            calls[event.index]["function"]["arguments"] += event.arguments
    return "".join(texts), list(calls.values())
