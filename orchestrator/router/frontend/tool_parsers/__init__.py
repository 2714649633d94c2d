"""Tool parsers: from the text of a choice to the tool calls in it. One module a parser.

:data:`TOOL_PARSERS` names them all. No setting chooses one yet: every model gets
:data:`orchestrator.router.frontend.text_models.TOOL_PARSER`. A second parser needs its line in the table, and a field of the model's card
that :func:`orchestrator.router.frontend.text_models.load_texts` passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from orchestrator.router.frontend.chat_messages import ToolRules
from orchestrator.router.frontend.tool_parsers.hermes import HermesToolParser


class ToolParser(Protocol):
    """The parser of one choice: :meth:`feed` for each piece of its text, then :meth:`finish` once. The pieces may be cut anywhere."""

    def feed(self, text: str) -> str:
        """The text that is now known to be no part of a call, to be shown at once."""

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(the rest of the text to show, the calls as OpenAI's ``tool_calls``)."""


#: Makes the parser of one choice.
MakeToolParser: TypeAlias = Callable[[ToolRules], ToolParser]

TOOL_PARSERS: Mapping[str, MakeToolParser] = {"hermes": HermesToolParser}
