"""`trireme logs`: the logs of all processes of a deployment, merged by time. Owns only the format of a line; it reads files, so it also
works when nothing runs."""

from __future__ import annotations

import re
import socket
import time
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir
from workers.protocol.errors import NotFound, Rejected, TriremeError

if TYPE_CHECKING:
    from orchestrator.control.host.log_files import LogEntry, LogFile

POLL_S = 0.25
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LEVELS = {"WARNING": "warn", "ERROR": "bad", "CRITICAL": "bad", "DEBUG": "dim"}


def logs(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DEPLOYMENT] [REPLICA|ROUTER|router|host]", help="Whose logs; by default all of the only deployment."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="This rank only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the logs, across relaunches, until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option("--since", metavar="10m|TIME", help="Start this long ago, or at a time (2026-11-22 10:00).")] = "",
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="Only this many of the last lines.")] = None,
    epoch: Annotated[str, typer.Option("--epoch", metavar="last|previous|all|N", help="Which launch of a replica.")] = "last",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show the logs of a deployment: `trireme logs -f`, `trireme logs chat-0 --rank 1 --since 10m`."""
    from orchestrator.control.host import log_files

    console: Console = context.obj
    if epoch not in ("last", "previous", "all") and not epoch.isdigit():
        raise Rejected(f"--epoch {epoch} is not an epoch", hint="use last, previous, all or a number from `trireme status -o json`")
    start = begin(since, time.time())
    home, owner = pick(names or [], Path(run_dir).expanduser())
    files = log_files.find(home, owner=owner, rank=rank, epoch=epoch)
    if not files and not follow:
        raise NotFound(f"no log of {owner or home.name} is here", f"nothing of rank {rank}, epoch {epoch}" if rank is not None else "",
                       f"trireme logs {home.name} --epoch all")  # fmt: skip
    for absent in elsewhere(home, owner, rank):
        console.warn(absent)
    readers = {file.path: log_files.LogReader(file) for file in files}
    lines = (entry for entry in log_files.merge(readers.values(), final=not follow) if entry.time >= start)
    show(console, lines if tail is None else deque(lines, maxlen=tail), files)
    while follow:
        time.sleep(POLL_S)
        files = log_files.find(home, owner=owner, rank=rank, epoch=epoch)
        # A gang that was replaced meanwhile may have unread lines.
        readers = {path: reader for path, reader in readers.items() if path.exists()}
        for file in files:
            readers.setdefault(file.path, log_files.LogReader(file))
        show(console, log_files.merge(readers.values(), final=False), files)


def begin(since: str, now: float) -> float:
    """The Unix time of ``--since``; 0 = all lines. Raises :class:`Rejected`."""
    if not since:
        return 0.0
    if match := _SPAN.fullmatch(since):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        return datetime.fromisoformat(since).timestamp()
    except ValueError:
        raise Rejected(f"--since {since} is not a time", hint="use 30s, 10m, 2h, 1d, or a time as 2026-11-22T10:00") from None


def pick(names: list[str], run_dir: Path) -> tuple[Path, str]:
    """The deployment's folder and the replica or router in ``names``; an empty owner means all.

    A single word is a deployment if there is one of that name, else an owner. DEPLOYMENT/REPLICA names both.
    """
    from orchestrator.control.host import log_files

    known = log_files.deployments(run_dir)
    words = [part for name in names for part in name.split("/") if part]
    if len(words) > 2:
        raise Rejected("too many names", hint="trireme logs [DEPLOYMENT] [REPLICA|ROUTER|router|host]")
    if len(words) == 2 or (words and words[0] in known):
        deployment, owner = words[0], words[1] if len(words) == 2 else ""
    else:
        deployment, owner = only(known, run_dir), words[0] if words else ""
    if deployment not in known:
        raise NotFound(f"no deployment {deployment!r} left logs", f"under {run_dir} there is {', '.join(known) or 'nothing'}")
    return run_dir / deployment, owner


def only(known: list[str], run_dir: Path) -> str:
    """The default deployment: the only one with logs, or the only one that runs."""
    from orchestrator.cli.running_deployments import find_running

    if not known:
        raise NotFound("there are no logs", f"nothing lies under {run_dir}", "trireme up FILE, or trireme serve MODEL")
    alive = [status.name for status in find_running(str(run_dir))] if len(known) > 1 else known
    if len(alive) != 1:
        raise Rejected(f"{len(known)} deployments left logs", ", ".join(known), "name one")
    return alive[0]


def elsewhere(home: Path, owner: str, rank: int | None) -> list[str]:
    """A line for each rank whose log file is on another machine. Empty when the deployment does not answer."""
    from orchestrator.control.host import control_socket

    try:
        status = control_socket.connect(home.name, home.parent).status()
    except TriremeError:
        return []
    here, absent = socket.gethostname(), []
    for row in (row for model in status.models for row in model.replicas if owner in ("", row.name)):
        for number, host, _ in row.pids:
            if host != here and rank in (None, number) and not Path(row.log_dir, f"rank{number}.log").exists():
                absent.append(f"{row.name} rank {number} runs on {host}; its log is there, {row.log_dir}/rank{number}.log")
    return absent


def show(console: Console, entries: Iterable[LogEntry], files: list[LogFile]) -> None:
    """Print an entry: time, process, level, text. Further lines of an entry are printed below its text."""
    width = max((len(file.label) for file in files), default=0)
    for entry in entries:
        stamp = datetime.fromtimestamp(entry.time).isoformat(" ", "milliseconds") if entry.time else " " * 23
        style = _LEVELS.get(entry.level, "")
        level = console.paint(f"{entry.level:<7} ", style) if style else f"{entry.level:<7} " if entry.level else ""
        first, *rest = entry.text.split("\n")
        logger = console.paint(f"{entry.logger}: ", "dim") if entry.logger else ""
        console.out(f"{console.paint(stamp, 'dim')} {console.paint(entry.source.ljust(width), 'hint')} {level}{logger}{first}")
        for line in rest:
            console.out(f"{' ' * (len(stamp) + 1)}{entry.source.ljust(width)} {line}")
