"""The Hermes form of tool calls: JSON objects in ``<tool_call>`` tags.

Owns the text of one choice while it may still be a tag or content. A call ends where its JSON object ends, so a tag inside a string is text
of that string, and a closing tag may be missing. Text that begins like a call but is not one is shown as text, with its tag; the text after
the tag is then parsed again.

    text -- opening tag --> call -- its object ends --> after -- closing tag, or other text --> text
                            call -- broken --> text
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from orchestrator.router.frontend.detokenizer import StopStrings
from orchestrator.router.frontend.tool_parsers.call_reader import CallReader
from orchestrator.router.frontend.tool_parsers.events import CallDelta, CallDropped, TextDelta, ToolEvent, new_call

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_OPENING = StopStrings((_OPEN,))
_SPACE = re.compile(r"\s*")


class HermesToolParser:
    """A :class:`~orchestrator.router.frontend.tool_parsers.ToolParser`."""

    markers: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        self._names, self._parallel = names, parallel
        self._state: Literal["text", "call", "after"] = "text"
        #: Text that is not decided yet: it may become a tag, or it is white space that is shown only if other text follows.
        self._held = ""
        #: Text was shown since the last call.
        self._has_text = False
        #: Of the call that is being read: its reader, its text from earlier pieces, its index (None = nothing of it is out).
        self._reader = CallReader(names)
        self._call: list[str] = []
        self._index: int | None = None
        self._begun = self._complete = 0

    def feed(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            if self._state == "text":
                at = self._read_text(text, at, events)
            elif self._state == "call":
                text, at = self._read_call(text, at, events)
            else:
                at = self._read_end(text, at)
        return events

    def finish(self, *, cut: bool) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        # An object that has not ended is broken, except where the output was cut inside of a call that is out, or left out.
        while self._state == "call" and not (cut and (self._index is not None or self._left_out)):
            self._give_up(events)
            events += self.feed("".join(self._call))
        if self._state == "text" and self._held and (self._held.strip() or not self._begun):
            events.append(TextDelta(text=self._held))
        return events

    @property
    def _left_out(self) -> bool:
        """Where a request takes one call, later ones are left out of the answer."""
        return not self._parallel and self._complete > 0

    def _read_text(self, text: str, at: int, events: list[ToolEvent]) -> int:
        """Show text up to an opening tag. White space alone, around calls, is not shown."""
        start = text.find(_OPEN, at)
        safe = start if start >= 0 else max(at, len(text) - _OPENING.partial(text))
        shown = text[at:safe]
        if shown and (self._has_text or not shown.isspace()):
            self._has_text = True
            events.append(TextDelta(text=shown))
            at = safe
        if start < 0:
            self._held = text[at:]
            return len(text)
        self._state, self._reader, self._call, self._index = "call", CallReader(self._names), [], None
        return start + len(_OPEN)

    def _read_call(self, text: str, at: int, events: list[ToolEvent]) -> tuple[str, int]:
        """(the text, where to go on in it): in the text of a call that turns out to be none, at its beginning."""
        reader = self._reader
        end = reader.feed(text, at)
        if not self._left_out and reader.name is not None:
            if self._index is None:
                self._index = self._begun
                self._begun += 1
                events.append(new_call(self._index, reader.name))
            if arguments := reader.take_arguments():
                events.append(CallDelta(index=self._index, arguments=arguments))
        if reader.broken:
            self._give_up(events)
            return ("".join(self._call) + text[at:], 0) if self._call else (text, at)
        if reader.done:
            self._complete += 1
            self._state, self._has_text = "after", False
        else:
            self._call.append(text[at:end])
        return text, end

    def _give_up(self, events: list[ToolEvent]) -> None:
        """The call is none: its tag is text, and what follows the tag is to be read again."""
        if self._index is not None:
            events.append(CallDropped(index=self._index))
        events.append(TextDelta(text=_OPEN))
        self._state, self._has_text = "text", True

    def _read_end(self, text: str, at: int) -> int:
        """Skip the closing tag of a call, where there is one."""
        space = _SPACE.match(text, at)
        assert space is not None
        start = space.end()
        rest = text[start : start + len(_CLOSE)]
        if rest != _CLOSE and _CLOSE.startswith(rest) and start + len(rest) == len(text):
            self._held = text[at:]
            return len(text)
        self._state = "text"
        return start + len(_CLOSE) if rest == _CLOSE else at
