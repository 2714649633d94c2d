"""Reads one tool call, a JSON object with a name and arguments, from text that comes in pieces.

Owns what is known of the call. The arguments are handed on as they come, byte for byte.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from orchestrator.router.frontend.tool_parsers.json_scanner import JsonScanner

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\n\r"
_State = Literal["start", "first_key", "key", "colon", "value", "next", "done", "broken"]


class CallReader:
    """The reading of one call: :meth:`feed` until :attr:`done` or :attr:`broken`. ``names``: the tools that may be called. Other keys than
    the name and the first arguments are skipped."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._state: _State = "start"
        #: Of the key or value that is being read.
        self._scanner = JsonScanner()
        self._kept: list[str] = []
        self._key = ""
        self._streams = False
        self._has_arguments = False
        self._arguments: list[str] = []
        #: The tool's name; None while it is unknown.
        self.name: str | None = None

    @property
    def done(self) -> bool:
        return self._state == "done"

    @property
    def broken(self) -> bool:
        return self._state == "broken"

    def take_arguments(self) -> str:
        """The text of the arguments that has come since the last call of this method."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def feed(self, text: str, at: int = 0) -> int:
        """The index after the last character, from ``at`` on, that belongs to the call."""
        while at < len(text) and not self.done and not self.broken:
            if self._state == "value" or (self._state in ("first_key", "key") and self._kept):
                at = self._read_part(text, at)
            elif text[at] in _SPACE:
                at += 1
            else:
                at = self._read_structure(text, at)
        return at

    def _read_structure(self, text: str, at: int) -> int:
        char = text[at]
        if self._state == "start" and char == "{":
            self._state = "first_key"
        elif self._state in ("first_key", "key") and char == '"':
            self._scanner, self._kept = JsonScanner(), [""]
            return at
        elif self._state == "colon" and char == ":":
            self._state = "value"
            self._scanner = JsonScanner()
        elif self._state == "next" and char == ",":
            self._state = "key"
        elif self._state in ("first_key", "next") and char == "}":
            self._end()
        else:
            self._state = "broken"
            return at
        return at + 1

    def _read_part(self, text: str, at: int) -> int:
        """A piece of a key or of a value."""
        if self._state == "value" and not self._kept and not self._streams:
            while at < len(text) and text[at] in _SPACE:
                at += 1
            if at == len(text):
                return at
            if self._key in _ARGUMENTS and not self._has_arguments and text[at] == "{":
                self._streams = self._has_arguments = True
        end = self._scanner.feed(text, at)
        (self._arguments if self._streams else self._kept).append(text[at:end])
        if self._scanner.broken:
            self._state = "broken"
        elif self._scanner.done:
            self._end_part()
        return end

    def _end_part(self) -> None:
        in_value, self._state = self._state == "value", "next" if self._state == "value" else "colon"
        wanted = not in_value or self._key == "name" or self._key in _ARGUMENTS
        wanted = wanted and not self._streams
        raw, self._kept, self._streams = "".join(self._kept), [], False
        if not wanted:
            return
        found = _decoded(raw)
        if not in_value:
            self._key = found if isinstance(found, str) else ""
        elif self._key == "name" and self.name is None:
            self.name = found if isinstance(found, str) and found in self._names else None
            if self.name is None:
                self._state = "broken"
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._take_whole(found)

    def _take_whole(self, found: Any) -> None:
        """Arguments that are no object: null stands for none, and some models write the object as a string."""
        self._has_arguments = True
        if found is None:
            self._arguments.append("{}")
        elif isinstance(found, str) and isinstance(_decoded(found), dict):
            self._arguments.append(found)
        else:
            self._state = "broken"

    def _end(self) -> None:
        if self.name is None:
            self._state = "broken"
            return
        self._state = "done"
        if not self._has_arguments:
            self._arguments.append("{}")


def _decoded(raw: str) -> Any:
    """The value of JSON; the empty tuple, which no JSON stands for, where it has none (half of a surrogate pair)."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return ()
