"""The help of every command of ``trireme``, of ``python -m workers`` and of ``python -m bench``, 100 columns wide and without colour.

The commands are read from the program itself, so a new command without a recording fails. The layout is the parser's, so another version
of typer, rich or Python's argparse may change it too. Record again: ``python -m tests.recorded.record help``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.cli.main import app
from tests.recorded import lines
from tests.recorded.recording import as_text, check, check_names

AREA = "help"
MODULES = ("workers", "bench")


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Words of every command and group, the whole program first."""
    yield path
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from walk(inner, (*path, name))


COMMANDS = list(walk(typer.main.get_command(app)))


def file_of(path: tuple[str, ...]) -> str:
    return "_".join(("trireme", *path)) + ".txt"


NAMES = [*map(file_of, COMMANDS), *(f"python_m_{module}.txt" for module in MODULES)]


def recordings() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        ran = lines.run([[*path, "--help"] for path in COMMANDS], Path(folder))
        others = [lines.run_module(module, "--help", folder=Path(folder)) for module in MODULES]
    for one in [*ran, *others]:
        assert one.code == 0 and not one.err, one
    return {name: as_text(one.out) for name, one in zip(NAMES, [*ran, *others], strict=True)}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_help_is_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_every_recorded_command_is_there() -> None:
    check_names(AREA, NAMES)
