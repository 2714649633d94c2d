"""Command lines that documentation shows, and what is wrong with them: each is parsed as its program would, and nothing is run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer.main

from orchestrator.cli.console import Console, ConsoleSettings
from orchestrator.cli.main import UsageError, app, normalise
from tests.support.source_tree import ROOT
from workers.protocol.errors import TriremeError

#: Words that end a command line; what follows them in the text is a line of its own, an explanation, or nothing.
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1"}
#: A program's words may be preceded by these: a prompt, an assignment of the shell, and programs that start other programs.
PREFIX = re.compile(r"^\$$|^\w+=|^sudo$")
PROGRAMS = ("trireme", "make", "python")
#: A value for `--tail N` and the like: a number, and a text too.
STAND_IN = "1"


def written_lines(text: str) -> Iterator[tuple[str, bool]]:
    """(line, whole) of a page: the lines of its code blocks, which are whole commands, and its `code spans`, which may leave words out."""
    prose = []
    fenced = False
    continued = ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            prose.append("")
        elif fenced or line.startswith("    "):
            line = continued + line.strip()
            continued = line.removesuffix("\\") if line.endswith("\\") else ""
            if not continued:
                yield line, True
        else:
            prose.append(line)
    for span in re.findall(r"`([^`]+)`", "\n".join(prose)):
        yield " ".join(span.replace("\\|", "|").split()), False


def without_comment(line: str) -> str:
    """The command alone: a comment and a second column, which two spaces set apart, are left out."""
    return re.split(r"\s+#\s|\s{2,}(?!-)", line.strip())[0]


def split_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line. Lines that the shell could not split are no commands."""
    try:
        words = shlex.split(without_comment(line))
    except ValueError:
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word in OPERATORS:
            yield command
            command = []
        else:
            command.append(word.removesuffix(";"))
            if word.endswith(";"):
                yield command
                command = []


def command_lines(text: str) -> Iterator[tuple[list[str], bool]]:
    """(words, whole) of each command of one of PROGRAMS in a page; the first word is the program.

    What a synopsis writes about a line is taken away: the brackets of what may be left out, dots for more, all but the first of
    alternatives.
    """
    for line, whole in written_lines(text):
        for words in split_commands(line):
            while words and PREFIX.match(words[0]):
                words.pop(0)
            for place, word in enumerate(words):
                if word in PROGRAMS and (place == 0 or words[0] in ("mpiexec", "ray", "srun", "nohup", "docker")):
                    complete = whole and "..." not in words and "…" not in words
                    yield [word, *plain_words(words[place + 1 :])], complete
                    break


def plain_words(words: list[str]) -> list[str]:
    """The words without the marks of a synopsis; a flag's value that is a name in capitals becomes STAND_IN."""
    plain: list[str] = []
    for word in words:
        word = word.strip("[]").partition("|")[0]
        if word.strip(".…"):
            plain.append(STAND_IN if word.isupper() and plain and plain[-1].startswith("-") else word)
    return plain


def fault(words: list[str], *, whole: bool) -> str:
    """Why a program would refuse this line, empty if it would not. ``whole``: nothing is left out of it."""
    name, *rest = words
    if name == "trireme":
        return cli_fault(rest, whole=whole)
    if name == "make":
        return make_fault(rest)
    return module_fault(rest, whole=whole)


@cache
def program() -> Any:
    """The parser of ``trireme``; it reads a command's flags once."""
    return typer.main.get_command(app)


def cli_fault(argv: list[str], *, whole: bool) -> str:
    command: Any = program()
    line, context = normalise(argv), None
    name = "trireme"
    try:
        while True:
            context = command.make_context(name, list(line), parent=context, obj=Console(ConsoleSettings(quiet=True)))
            if not hasattr(command, "commands"):
                return ""
            rest = [*context._protected_args, *context.args]
            if not rest:
                return ""
            if rest[0].isupper() or rest[0] == STAND_IN:
                return ""  # COMMAND stands for any
            name, command, line = command.resolve_command(context, rest)
    except (typer.Exit, TriremeError):
        return ""  # --help and --version; a value that only this machine refuses
    except UsageError as error:
        left_out = not whole and ("Missing" in type(error).__name__ or "NoArgs" in type(error).__name__)
        return "" if left_out else str(getattr(error, "format_message", error.__str__)())


def make_fault(argv: list[str]) -> str:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    unknown = [word for word in argv if not word.startswith("-") and "=" not in word and word not in targets]
    return f"no target {', '.join(unknown)}" if unknown else ""


def module_file(name: str) -> Path | None:
    """The file that ``python -m name`` runs, None if that is no module of the project."""
    place = ROOT.joinpath(*name.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__main__.py") if file.is_file()), None)


def module_fault(argv: list[str], *, whole: bool) -> str:
    if len(argv) < 2 or argv[0] != "-m":
        return ""
    name, *rest = argv[1:]
    if name.partition(".")[0] not in ("orchestrator", "workers", "trireme", "bench", "tests"):
        return ""
    file = module_file(name)
    if file is None:
        return f"no module {name} to run"
    tree = ast.parse(file.read_text())
    if any(isinstance(node, ast.FunctionDef) and node.name == "parse" for node in tree.body):
        return parse_fault(f"{name}.__main__" if file.name == "__main__.py" else name, rest) if whole or rest else ""
    unknown = sorted({word.partition("=")[0] for word in rest if word.startswith("--")} - flags(tree))
    return f"{name} has no flag {', '.join(unknown)}" if unknown else ""


def parse_fault(module: str, argv: list[str]) -> str:
    """What the module's own ``parse`` says."""
    try:
        import_module(module).parse(argv)
    except TriremeError as error:
        return str(error)
    except SystemExit as error:
        return f"{module} ends with {error.code}" if error.code else ""
    return ""


def flags(tree: ast.Module) -> set[str]:
    """The flags that a module gives to ``add_argument``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"]
    return {word.value for call in calls for word in call.args if isinstance(word, ast.Constant)} | {"--help"}
