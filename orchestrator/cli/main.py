"""The `trireme` command: spelling of flags, global flags, and error handling. Each command is in the module of its name in this package.

Owns the process's exit code. Must stay cheap to start: a command line imports the module of its own command alone, and that imports what it
needs when it runs. `trireme --help` imports all modules of commands, and so they import no engine, no Ray, no HTTP at their top.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from orchestrator.cli import console
from orchestrator.cli.command_group import CommandGroup, first_paragraph
from orchestrator.cli.extras import missing_package
from orchestrator.cli.other_servers import COMMANDS as COMMANDS_ELSEWHERE
from orchestrator.cli.other_servers import FLAGS, SPELLINGS
from workers.protocol.errors import Rejected, TriremeError

#: Short forms that users know from other servers; the parser does not support one dash with two letters.
SHORT = {"-tp": "--tp-size", "-pp": "--pp-size", "-dp": "--replicas"}
#: Global flags, which may be anywhere on the line, and whether a value follows.
GLOBAL = {"--quiet": False, "--debug": False, "--log-format": True}
#: `typer` does not export its parser; every error about the command line is a subclass of this.
UsageError = typer.BadParameter.__mro__[1]

#: All commands and groups of commands, each in the module of its name, in the order of the help.
COMMANDS = (
    "serve", "up", "router", "status", "drain", "down", "top", "logs", "update", "chat", "generate", "bench", "pull", "convert", "inspect",
    "build", "verify", "doctor", "version", "plan", "demo", "keys", "engines", "config", "submit", "debug",
)  # fmt: skip


def definition(name: str) -> Any:
    """The function of a command, or the :class:`typer.Typer` of a group, as its module defines it."""
    return getattr(import_module(f"orchestrator.cli.{name}"), name)


class CommandTable(MutableMapping[str, Any]):
    """Maps names to the parser's commands. A command is imported, and its flags are read, at its first look-up."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = dict.fromkeys(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        if self._made[name] is None:
            alone, part = typer.Typer(rich_markup_mode=None, add_completion=False), definition(name)
            if isinstance(part, typer.Typer):
                alone.add_typer(part)
                self._made[name] = typer.main.get_group(alone).commands[name]
            else:
                alone.command(name)(part)
                self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class Program(CommandGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": CommandTable()})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def summaries(self) -> Iterator[tuple[str, str]]:
        """List the texts only: the flags of listed commands are not read."""
        for name in COMMANDS:
            part = definition(name)
            yield name, first_paragraph(part.info.help if isinstance(part, typer.Typer) else inspect.getdoc(part))


app = typer.Typer(
    cls=Program,
    name="trireme",
    help="Serve large language models from gangs of MPI ranks behind one HTTP and ZeroMQ endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(context: typer.Context, asked: bool) -> None:
    """``trireme --version``: print the version and exit."""
    if asked:
        definition("version")(context)
        raise typer.Exit


@app.callback()
def common(
    quiet: Annotated[bool, typer.Option("--quiet", help="Results and errors only.")] = False,
    log_format: Annotated[str, typer.Option("--log-format", metavar="text|json", help="Format of progress and errors.")] = "text",
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """The global flags, for the parser's help; :func:`settings` has already read them."""


def normalise(argv: Sequence[str]) -> list[str]:
    """Normalize a line: dashes within long flags, our names for flags of other servers, long forms of ``-tp`` and ``-pp``, global flags
    first. Words after ``--`` stay as they are."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        flag, equals, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
            flag = SPELLINGS.get(flag, flag)
        target = front if flag in GLOBAL else rest
        target.append(flag + equals + value)
        if GLOBAL.get(flag) and not equals and (following := next(words, None)) is not None:
            front.append(following)
    return front + rest


def settings(line: Sequence[str]) -> console.ConsoleSettings:
    """The global flags at the front of a normalized line. Raises :class:`Rejected` on a log format that does not exist."""
    words = list(line)
    chosen = {"--log-format": "text"}
    while words and (flag := words[0].partition("="))[0] in GLOBAL:
        words.pop(0)
        chosen[flag[0]] = flag[2] if flag[1] else words.pop(0) if GLOBAL[flag[0]] and words else ""
    log_format = chosen["--log-format"]
    if log_format not in ("text", "json"):
        raise Rejected(f"--log-format {log_format} is not a format", hint="use text or json")
    return console.ConsoleSettings(
        quiet="--quiet" in chosen, debug="--debug" in chosen, log_format="json" if log_format == "json" else "text"
    )


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1 unexpected, 2 usage, 3 config, 4 environment, 5 worker lost, 130 interrupted."""
    line = normalise(argv)
    terminal = console.Console(console.ConsoleSettings())
    try:
        terminal = console.Console(settings(line))
        return int(app(line, prog_name="trireme", standalone_mode=False, obj=terminal) or 0)
    except TriremeError as error:
        return terminal.fail(error)
    except (KeyboardInterrupt, typer.Abort):
        terminal.say("interrupted")
        return console.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader closed the pipe (`trireme status | head`): the interpreter must not write to it at exit
        return 0
    except Exception as error:
        if isinstance(error, UsageError):
            return usage(error, terminal)
        if isinstance(error, ModuleNotFoundError) and (missing := missing_package(error)) is not None:
            return terminal.fail(missing)
        what = f"unexpected {type(error).__name__}: {error}"
        fault = TriremeError(what, hint="" if terminal.settings.debug else "run again with --debug and report the stack trace")
        fault.__cause__ = error
        return terminal.fail(fault)


def usage(error: Exception, terminal: console.Console) -> int:
    """Print the error in the line and the command that prints the help."""
    context = getattr(error, "ctx", None)
    if hint := known_elsewhere(error):
        return terminal.fail(Rejected(getattr(error, "format_message", lambda: str(error))().rstrip("."), hint=hint))
    message = getattr(error, "format_message", lambda: str(error))()
    if message.startswith("Usage: "):  # a group without a command: print its help
        terminal.out(message)
        return 2
    path = context.command_path if context is not None else "trireme"
    return terminal.fail(Rejected(message.rstrip("."), hint=f"{path} --help"))


def known_elsewhere(error: Exception) -> str:
    """What to write instead of a flag or a command of another server; empty for an unknown one."""
    if flag := getattr(error, "option_name", ""):
        return FLAGS.get(flag.replace("_", "-"), "")
    word = re.fullmatch(r"No such command '(.+)'\.?", str(getattr(error, "message", "")).partition(" Did you")[0].strip())
    return COMMANDS_ELSEWHERE.get(word[1], "") if word else ""
