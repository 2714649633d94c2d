"""Tool parsers: from the text of a choice to the tool calls in it, piece by piece. One module a format.

:data:`TOOL_PARSERS` names them all: a new format is a module and a line there. No setting chooses one yet: every model gets
:data:`orchestrator.router.frontend.text_models.TOOL_PARSER`. A forced call has the same form for every model (``forced``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from orchestrator.router.frontend.chat_messages import ToolRules
from orchestrator.router.frontend.tool_parsers.events import ChoiceParser
from orchestrator.router.frontend.tool_parsers.forced import NamedCall, OneCall
from orchestrator.router.frontend.tool_parsers.hermes import HermesToolParser


class ToolParser(ChoiceParser, Protocol):
    """The parser of a model's own format."""

    #: Texts that mark calls. The parser gets them even if they are special tokens of the tokenizer.
    markers: ClassVar[tuple[str, ...]]

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        """``names``: the tools; a call of another one is text. ``parallel``: an answer may have several calls; if not, later ones are
        omitted, but text is never omitted."""


TOOL_PARSERS: Mapping[str, type[ToolParser]] = {"hermes": HermesToolParser}


def choice_parser(rules: ToolRules, own: type[ToolParser]) -> ChoiceParser:
    """The parser of one choice; ``own``: that of the model's format."""
    if rules.named is not None:
        return NamedCall(rules.named)
    if rules.required:
        return OneCall(rules.names, own(rules.names, parallel=rules.parallel))
    return own(rules.names, parallel=rules.parallel)
