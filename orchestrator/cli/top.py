"""`trireme top`: deployments, replicas and ranks with their rates, redrawn each second; one plain snapshot if stdout is not a terminal.

Owns the samples from which rates are computed, and the terminal while it draws. Asks the control sockets of this user's deployments, as
`status` does.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from orchestrator.cli import running_deployments
from orchestrator.cli.console import Console, age, size, table
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.control.host.control_socket import DeploymentStatus, ModelRow

#: Up to this number, ranks are shown without --ranks.
FEW_RANKS = 16
#: Time between the two samples of a snapshot, seconds.
SNAPSHOT_S = 1.0

_STYLES = {"READY": "green", "DEGRADED": "yellow", "STARTING": "yellow", "LOADING": "yellow", "DRAINING": "yellow", "FAILED": "red",
           "BACKOFF": "red", "QUARANTINED": "yellow", "PENDING": "yellow", "PLACING": "yellow"}  # fmt: skip


class Sheet(msgspec.Struct, frozen=True):
    """A table: ``rows`` of text under ``header``; ``numbers``: columns that are right-aligned."""

    header: tuple[str, ...]
    rows: list[list[str]]
    numbers: frozenset[str] = frozenset()


class Frame(msgspec.Struct, frozen=True):
    """The content of one screen: a line for each deployment, and the tables."""

    headlines: list[tuple[str, str]]
    sheets: list[Sheet]


class Meter:
    """The last two samples. CPU shares and rates refer to the time between them."""

    def __init__(self) -> None:
        self._admitted: dict[tuple[str, str], tuple[float, int]] = {}
        self._rates: dict[tuple[str, str], float] = {}
        self._processes: dict[int, Any] = {}

    def look(self, found: list[DeploymentStatus], now: float) -> None:
        """Record one status of each deployment; ``now`` in seconds. The counters of a replaced router begin at 0: its rate is 0 then."""
        for status in found:
            for model in status.models:
                key = (status.name, model.name)
                at, before = self._admitted.get(key, (now, model.admitted))
                self._rates[key] = max(0, model.admitted - before) / (now - at) if now > at else 0.0
                self._admitted[key] = (now, model.admitted)

    def rate(self, status: DeploymentStatus, model: ModelRow) -> float:
        """Requests admitted a second."""
        return self._rates.get((status.name, model.name), 0.0)

    def process(self, host: str, pid: int) -> tuple[str, str]:
        """(CPU share, resident memory) of a process on this host; dashes for processes on other hosts and for ended ones."""
        import psutil

        if host != socket.gethostname():
            return "-", "-"
        try:
            process = self._processes.setdefault(pid, psutil.Process(pid))
            return f"{process.cpu_percent():.0f} %", size(process.memory_info().rss)
        except psutil.Error:
            self._processes.pop(pid, None)
            return "-", "-"


def top(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the deployment; by default all.")] = "",
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot, as if the output were not a terminal.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, metavar="SECONDS", help="Seconds between two screens.")] = 1.0,
    ranks: Annotated[
        bool | None, typer.Option("--ranks/--no-ranks", help="Show a line for each rank; by default if there are few.")
    ] = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Watch deployments: requests and tokens a second, queues, KV cache, replicas and their ranks. `q` or Ctrl-C ends it."""
    console: Console = context.obj
    meter = Meter()

    def sample() -> Frame:
        found = [running_deployments.pick(name, run_dir).status()] if name else running_deployments.find_running(run_dir)
        if not found:
            running_deployments.pick("", run_dir)
        meter.look(found, time.monotonic())
        return frame(found, meter, ranks)

    if once or not console.stdout.isatty():
        sample()
        time.sleep(SNAPSHOT_S)
        console.out(plain(sample()))
    else:
        watch(console, sample, every)


def frame(found: list[DeploymentStatus], meter: Meter, ranks: bool | None) -> Frame:
    """The tables of ``found``."""
    rows = [(status, row) for status in found for model in status.models for row in model.replicas]
    models = Sheet(
        ("MODEL", "STATE", "READY", "REQ/S", "TOK/S", "RUNNING", "QUEUE", "KV"),
        [
            [
                f"{status.name}/{model.name}", model.state, f"{model.ready}/{model.wanted}", f"{meter.rate(status, model):.1f}",
                f"{model.tok_s:.1f}", str(sum(row.running for row in model.replicas)), str(model.queue), share(fullness(model)),
            ]
            for status in found for model in status.models
        ],
        frozenset(("REQ/S", "TOK/S", "RUNNING", "QUEUE", "KV")),
    )  # fmt: skip
    replicas = Sheet(
        ("REPLICA", "STATE", "AGE", "RANKS", "RUNNING", "QUEUE", "TOK/S", "KV", "RESTARTS", "CAUSE"),
        [
            [
                f"{status.name}/{row.name}", row.state, age(row.age_s), f"{row.tp * row.pp} (tp {row.tp} pp {row.pp})", str(row.running),
                str(row.queue), f"{row.tok_s:.1f}", share(row.kv_use), str(row.restarts), row.cause or "-",
            ]
            for status, row in rows
        ],
        frozenset(("RUNNING", "QUEUE", "TOK/S", "KV", "RESTARTS")),
    )  # fmt: skip
    sheets = [models, replicas]
    known = [(status, row, rank, host, pid) for status, row in rows for rank, host, pid in row.pids]
    if ranks if ranks is not None else len(known) <= FEW_RANKS:
        lines = [
            [f"{status.name}/{row.name}", str(rank), host, str(pid), *meter.process(host, pid)]
            for status, row, rank, host, pid in known
        ]  # fmt: skip
        sheets.append(Sheet(("REPLICA", "RANK", "HOST", "PID", "CPU", "MEMORY"), lines, frozenset(("RANK", "PID", "CPU", "MEMORY"))))
    return Frame([(status.state, headline(status, meter)) for status in found], sheets)


def headline(status: DeploymentStatus, meter: Meter) -> str:
    requests = sum(meter.rate(status, model) for model in status.models)
    tokens, queue = sum(model.tok_s for model in status.models), sum(model.queue for model in status.models)
    living = sum(len(row.pids) for model in status.models for row in model.replicas)
    ready, wanted = sum(model.ready for model in status.models), sum(model.wanted for model in status.models)
    return (
        f"{status.name}: {ready} of {wanted} replicas ready, {living} ranks, {requests:.1f} req/s, {tokens:.1f} tok/s, queue {queue}, "
        f"up {age(status.age_s)}, {status.url or 'no HTTP API yet'}"
    )


def fullness(model: ModelRow) -> float:
    """Share of the KV blocks in use, over all replicas of the model."""
    sizes = [(row.kv_use, row.capacity.num_blocks) for row in model.replicas if row.capacity is not None]
    blocks = sum(size for _, size in sizes)
    return sum(use * size for use, size in sizes) / blocks if blocks else 0.0


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def plain(shown: Frame) -> str:
    """A frame as text, for files and pipes."""
    lines = [f"{state}  {text}" for state, text in shown.headlines]
    return "\n\n".join(["\n".join(lines), *(table(list(sheet.header), sheet.rows) for sheet in shown.sheets if sheet.rows)])


def drawn(shown: Frame) -> RenderableType:
    """A frame for a terminal, which cuts long lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [
        Text.assemble((state, f"bold {_STYLES.get(state, '')}"), "  ", text, overflow="ellipsis") for state, text in shown.headlines
    ]
    for sheet in shown.sheets:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in sheet.header:
            right = title in sheet.numbers
            grid.add_column(
                title, justify="right" if right else "left", no_wrap=True, overflow="ellipsis", ratio=1 if title == "CAUSE" else None
            )
        for row in sheet.rows:
            grid.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        parts += [Text(""), grid]
    return Group(*parts)


def watch(console: Console, sample: Callable[[], Frame], every: float) -> None:
    """Draw until the user stops it; then restore the screen."""
    from rich.console import Console as Terminal
    from rich.live import Live

    live = Live(drawn(sample()), console=Terminal(file=console.stdout), screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), keys() as pressed, live:
        live.refresh()
        while not pressed(every):
            live.update(drawn(sample()), refresh=True)


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits for a number of seconds and returns whether `q` was pressed; without a keyboard it only waits."""
    if not sys.stdin.isatty():
        yield lambda seconds: bool(select.select([], [], [], seconds)[0])
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    tty.setcbreak(file)

    def pressed(seconds: float) -> bool:
        return bool(select.select([file], [], [], seconds)[0]) and os.read(file, 64).lower().startswith(b"q")

    try:
        yield pressed
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
