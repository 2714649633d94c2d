"""The text of a forced tool call: JSON alone, the same for every model, because a grammar of ours made it.

The grammars are :func:`orchestrator.router.frontend.structured_output.arguments_guide` and ``call_guide``.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.router.frontend.tool_parsers.call_reader import CallReader
from orchestrator.router.frontend.tool_parsers.events import CallDelta, CallDropped, ChoiceParser, TextDelta, ToolEvent, new_call


class NamedCall:
    """The whole text is the arguments of the function ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = self._has_text = False
        #: White space at the end of the text so far.
        self._space = ""

    def feed(self, text: str) -> list[ToolEvent]:
        events = self._begin()
        text = self._space + text if self._has_text else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._has_text = True
            events.append(CallDelta(index=0, arguments=shown))
        return events

    def finish(self, *, cut: bool) -> list[ToolEvent]:
        return self._begin()

    def _begin(self) -> list[ToolEvent]:
        if self._begun:
            return []
        self._begun = True
        return [new_call(0, self._name)]


class OneCall:
    """The whole text is one call of any of ``names``. Text that is no JSON object is left to ``own``, the parser of the model's format."""

    def __init__(self, names: frozenset[str], own: ChoiceParser) -> None:
        self._reader = CallReader(names)
        #: Who reads the text; None until its first character that is no white space.
        self._reads: Literal["call", "own"] | None = None
        self._own = own
        self._text: list[str] = []
        self._begun = False

    def feed(self, text: str) -> list[ToolEvent]:
        if self._reads is None and (first := text.lstrip()[:1]):
            self._reads = "call" if first == "{" else "own"
            text = "".join(self._text) + text
            self._text.clear()
        if self._reads == "call":
            return self._read_call(text)
        if self._reads == "own":
            return self._own.feed(text)
        self._text.append(text)
        return []

    def finish(self, *, cut: bool) -> list[ToolEvent]:
        if self._reads == "own":
            return self._own.finish(cut=cut)
        if self._reader.done or self._reader.broken or (cut and self._begun):
            return []
        return self._give_up("")

    def _read_call(self, text: str) -> list[ToolEvent]:
        reader = self._reader
        if reader.broken:
            return [TextDelta(text=text)] if text else []
        end = reader.feed(text)
        events: list[ToolEvent] = []
        if reader.name is not None:
            if not self._begun:
                self._begun = True
                events.append(new_call(0, reader.name))
            if arguments := reader.take_arguments():
                events.append(CallDelta(index=0, arguments=arguments))
        if reader.broken:
            return events + self._give_up(text)
        self._text.append(text[:end])
        if rest := text[end:].strip():
            events.append(TextDelta(text=rest))
        return events

    def _give_up(self, rest: str) -> list[ToolEvent]:
        events: list[ToolEvent] = [CallDropped(index=0)] if self._begun else []
        text = "".join(self._text) + rest
        return [*events, TextDelta(text=text)] if text else events
