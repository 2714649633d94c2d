"""The help of a group of commands: it shows the whole first paragraph of each command's text, which the parser would cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a command's text, as one line."""
    return " ".join((text or "").partition("\n\n")[0].split())


class CommandGroup(TyperGroup):
    """A group whose help has no boxes, because drawing them takes as long as the rest of a start."""

    def summaries(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each command that is shown."""
        for name, command in self.commands.items():
            if not command.hidden:
                yield name, first_paragraph(command.help)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries()))
