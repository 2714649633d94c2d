"""Tool calls in a model's output: from text to ``tool_calls``.

Owns one choice's held-back text. Plain text passes at once; from a call's opening tag on (or all of it, where the call was forced)
everything waits for the end, since a call that turns out not to parse is shown as the text it is.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import msgspec

from orchestrator.router.frontend.chat_messages import NamedTool
from orchestrator.router.frontend.detokenizer import StopStrings
from orchestrator.router.frontend.schema import ChatBody

_OPEN = StopStrings(("<tool_call>",))
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    parameters: msgspec.Raw | None = None


class HermesToolParser:
    """Feed it a choice's text, then ask for the calls. ``named``: the one function whose arguments the whole text is."""

    def __init__(self, names: frozenset[str], *, named: str | None, forced: bool) -> None:
        self._names, self._named = names, named
        self._holding = forced or named is not None
        self._held = ""

    def feed(self, text: str) -> str:
        """Text that is surely not part of a call."""
        self._held += text
        if self._holding:
            return ""
        match = _OPEN.find(self._held)
        if match is not None:
            self._holding = True
            safe = match[0]
        else:
            safe = len(self._held) - _OPEN.held(self._held)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(text left to show, calls); the text is empty where there are calls."""
        held = self._held.strip()
        if self._named is not None:
            return "", [_call_json(self._named, held)]
        bodies = _CALL.findall(held) or [held]
        calls = [call for body in bodies if (call := self._read(body)) is not None]
        return ("", calls) if calls and len(calls) == len(bodies) else (self._held, [])

    def _read(self, body: str) -> dict[str, Any] | None:
        try:
            call = msgspec.json.decode(body, type=_Call)
        except (msgspec.DecodeError, RecursionError):
            return None
        arguments = call.parameters if call.parameters is not None else call.arguments
        return _call_json(call.name, bytes(arguments).decode()) if call.name in self._names else None


def reader(request: ChatBody) -> HermesToolParser | None:
    """A reader for one choice, or None where the request can have no calls."""
    if not request.tools or request.tool_choice == "none":
        return None
    named = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    names = frozenset(tool.function.name for tool in request.tools)
    return HermesToolParser(names, named=named, forced=request.tool_choice == "required")


def _call_json(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}
