"""Finds the end of a JSON value in text that comes in pieces, and the first character that breaks it (RFC 8259).

Owns its place in the value and never the text. It needs no recursion and looks at each character once.

    value -> string | scalar | first_key | first_value        first_key, key -> key string -> colon -> value
    string, scalar, "}" and "]" -> next, or done where the value was the outermost          next -> key | value | a close
"""

from __future__ import annotations

import re
from typing import Literal

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_PART = re.compile(r"[A-Za-z0-9+.-]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_CLOSE = {"{": "}", "[": "]"}

_State = Literal["value", "first_value", "first_key", "key", "colon", "next", "string", "scalar", "done", "broken"]


class JsonScanner:
    """The scan of one value: :meth:`feed` until :attr:`done` or :attr:`broken`."""

    def __init__(self) -> None:
        self._state: _State = "value"
        self._open: list[str] = []
        #: The string that is being read is a key.
        self._in_key = False
        #: What is known of an unfinished escape, or of a scalar.
        self._token = ""

    @property
    def done(self) -> bool:
        return self._state == "done"

    @property
    def broken(self) -> bool:
        return self._state == "broken"

    def feed(self, text: str, at: int = 0) -> int:
        """The index after the last character, from ``at`` on, that belongs to the value; white space around the value does not end it but
        is skipped before it. A scalar at the top ends with the first character that cannot belong to it."""
        while at < len(text) and self._state not in ("done", "broken"):
            if self._state == "string":
                at = self._read_string(text, at)
            elif self._state == "scalar":
                at = self._read_scalar(text, at)
            else:
                at = self._read_structure(text, at)
        return at

    def _read_structure(self, text: str, at: int) -> int:
        space = _SPACE.match(text, at)
        assert space is not None
        at = space.end()
        if at == len(text):
            return at
        char, state = text[at], self._state
        if state == "colon" and char == ":":
            self._state = "value"
        elif state == "next" and char == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif state in ("next", "first_key", "first_value") and char == _CLOSE[self._open[-1]]:
            self._open.pop()
            self._end_value()
        elif state in ("first_key", "key") and char == '"':
            self._state, self._in_key = "string", True
        elif state in ("value", "first_value"):
            return self._begin_value(char, at)
        else:
            self._state = "broken"
            return at
        return at + 1

    def _begin_value(self, char: str, at: int) -> int:
        if char in _CLOSE:
            self._open.append(char)
            self._state = "first_key" if char == "{" else "first_value"
        elif char == '"':
            self._state, self._in_key = "string", False
        elif char in "-0123456789tfn":
            self._state, self._token = "scalar", ""
            return at
        else:
            self._state = "broken"
            return at
        return at + 1

    def _read_string(self, text: str, at: int) -> int:
        if self._token:
            self._token += text[at]
            if _ESCAPE.fullmatch(self._token):
                self._token = ""
            elif not _ESCAPE_BEGUN.fullmatch(self._token):
                self._state = "broken"
                return at
            return at + 1
        plain = _PLAIN.match(text, at)
        assert plain is not None
        at = plain.end()
        if at == len(text):
            return at
        if text[at] == "\\":
            self._token = "\\"
        elif text[at] == '"':
            if self._in_key:
                self._state = "colon"
            else:
                self._end_value()
        else:  # a control character
            self._state = "broken"
            return at
        return at + 1

    def _read_scalar(self, text: str, at: int) -> int:
        part = _SCALAR_PART.match(text, at)
        assert part is not None
        self._token += part[0]
        at = part.end()
        if at < len(text):
            self.end()
        return at

    def end(self) -> None:
        """Nothing follows: a scalar at the top is whole, or the value is broken."""
        if self._state == "scalar" and _SCALAR.fullmatch(self._token):
            self._token = ""
            self._end_value()
        elif self._state != "done":
            self._state = "broken"

    def _end_value(self) -> None:
        self._state = "next" if self._open else "done"
