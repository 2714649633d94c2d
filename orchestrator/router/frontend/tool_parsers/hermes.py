"""The Hermes form of tool calls: JSON objects in ``<tool_call>`` tags.

Owns the text of one choice that is not shown yet. Plain text is shown at once. From the first opening tag on (or from the start, where a
call was required) all text waits for the end of the choice, because text that turns out to be no call is shown as text.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import msgspec

from orchestrator.router.frontend.chat_messages import ToolRules
from orchestrator.router.frontend.detokenizer import StopStrings

_OPEN = StopStrings(("<tool_call>",))
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    parameters: msgspec.Raw | None = None


class HermesToolParser:
    """A :class:`~orchestrator.router.frontend.tool_parsers.ToolParser`."""

    def __init__(self, rules: ToolRules) -> None:
        self._rules = rules
        #: No more text is shown before the end.
        self._waiting = rules.required or rules.named is not None
        self._unshown = ""

    def feed(self, text: str) -> str:
        self._unshown += text
        if self._waiting:
            return ""
        match = _OPEN.find(self._unshown)
        if match is not None:
            self._waiting = True
            safe = match[0]
        else:
            safe = len(self._unshown) - _OPEN.partial(self._unshown)
        shown, self._unshown = self._unshown[:safe], self._unshown[safe:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        unshown = self._unshown.strip()
        if self._rules.named is not None:
            return "", [_call_json(self._rules.named, unshown)]
        bodies = _CALL.findall(unshown) or [unshown]
        calls = [call for body in bodies if (call := self._read(body)) is not None]
        return ("", calls) if calls and len(calls) == len(bodies) else (self._unshown, [])

    def _read(self, body: str) -> dict[str, Any] | None:
        try:
            call = msgspec.json.decode(body, type=_Call)
        except (msgspec.DecodeError, RecursionError):
            return None
        arguments = call.parameters if call.parameters is not None else call.arguments
        return _call_json(call.name, bytes(arguments).decode()) if call.name in self._rules.names else None


def _call_json(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}
