"""The `trireme` command: spelling, global flags, and what happens to an error. Each command is in the module of its name beside this file.

Owns the process's exit code. Must stay cheap to import: `trireme --help` costs no engine, no Ray, no HTTP; each command imports what it
needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from orchestrator.cli import (
    bench,
    build,
    chat,
    config,
    console,
    convert,
    debug,
    demo,
    doctor,
    down,
    drain,
    engines,
    generate,
    inspect,
    keys,
    logs,
    plan,
    pull,
    router,
    serve,
    status,
    submit,
    top,
    up,
    update,
    verify,
    version,
)
from workers.protocol.errors import Rejected, TriremeError

#: Short forms that other servers taught people; one dash and two letters are not a shape that the parser knows.
SHORT = {"-tp": "--tp-size", "-pp": "--pp-size"}
#: Flags that mean the same wherever they stand on the line, and whether a value follows.
GLOBAL = {"--quiet": False, "--debug": False, "--log-format": True}
#: `typer` keeps its parser to itself; every complaint about the line is a kind of this.
UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="trireme",
    help="Serve large language models from gangs of MPI ranks behind one HTTP and ZeroMQ endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(
    quiet: Annotated[bool, typer.Option("--quiet", help="Results and errors only.")] = False,
    log_format: Annotated[str, typer.Option("--log-format", metavar="text|json", help="How progress and errors are told.")] = "text",
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces.")] = False,
) -> None:
    """The global flags, for the parser and its help; :func:`settings` has read them before."""


#: All commands and groups of commands, each in the module of its name, in the order of the help.
COMMANDS: tuple[Callable[..., None], ...] = (
    serve.serve, up.up, router.router, status.status, drain.drain, down.down, top.top, logs.logs, update.update, chat.chat,
    generate.generate, bench.bench, pull.pull, convert.convert, inspect.inspect, build.build, verify.verify, doctor.doctor,
    version.version, plan.plan,
)  # fmt: skip
HIDDEN_COMMANDS = (demo.demo,)
GROUPS = (keys.keys, engines.engines, config.config, submit.submit, debug.debug)

for command in COMMANDS:
    app.command()(command)
for command in HIDDEN_COMMANDS:
    app.command(hidden=True)(command)
for group in GROUPS:
    app.add_typer(group)


def normalise(argv: Sequence[str]) -> list[str]:
    """One spelling: dashes within long flags, long forms of ``-tp`` and ``-pp``, global flags first. What follows ``--`` is left alone."""
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
        target = front if flag in GLOBAL else rest
        target.append(flag + equals + value)
        if GLOBAL.get(flag) and not equals and (following := next(words, None)) is not None:
            front.append(following)
    return front + rest


def settings(line: Sequence[str]) -> console.ConsoleSettings:
    """What the global flags at the front of a normalised line say. Raises :class:`Rejected` on a log format that does not exist."""
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
        return console.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader left (`trireme status | head`): nothing more to say, and the interpreter must not try
        return 0
    except Exception as error:
        if isinstance(error, UsageError):
            return usage(error, terminal)
        what = f"unexpected {type(error).__name__}: {error}"
        fault = TriremeError(what, hint="" if terminal.settings.debug else "run again with --debug and report the stack trace")
        fault.__cause__ = error
        return terminal.fail(fault)


def usage(error: Exception, terminal: console.Console) -> int:
    """Print what is wrong with the line and the command that prints its help."""
    context = getattr(error, "ctx", None)
    message = getattr(error, "format_message", lambda: str(error))()
    if not message:  # a group without a command: its help was the answer
        return 2
    path = context.command_path if context is not None else "trireme"
    return terminal.fail(Rejected(message.rstrip("."), hint=f"{path} --help"))


def main() -> None:
    """Entry point of the distribution."""
    sys.exit(run(sys.argv[1:]))
