"""Output of the command line: results on stdout, progress on stderr, errors as error/why/hint lines.

Owns the terminal's settings (quiet, log format, colour) for this process and every progress bar. Decides only about the format.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec

from workers.protocol.errors import TriremeError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LogFormat = Literal["text", "json"]
#: (phase, bytes done, bytes in all); 0 in all = not known.
Progress = Callable[[str, int, int], None]
#: A plain progress line at most this often, seconds.
PLAIN_EVERY_S = 5.0
#: Shortest time between two progress lines in a file or pipe while another program's log is shown, seconds.
FOLLOW_EVERY_S = 30.0
INTERRUPTED = 130

_STYLES = {"error": "1;31", "hint": "36", "good": "32", "warn": "33", "bad": "31", "dim": "2", "bold": "1"}


class ConsoleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Values of the global flags."""

    quiet: bool = False
    log_format: LogFormat = "text"
    debug: bool = False


class Console:
    """The terminal of one process. ``say`` prints messages (stderr), ``out`` prints results (stdout)."""

    def __init__(self, settings: ConsoleSettings, *, stdout: IO[str] | None = None, stderr: IO[str] | None = None) -> None:
        self.settings = settings
        self.stdout, self.stderr = stdout or sys.stdout, stderr or sys.stderr
        self._bars: Bars | None = None
        self._lines: PlainProgress | None = None

    def colours(self, stream: IO[str]) -> bool:
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def paint(self, text: str, style: str, stream: IO[str] | None = None) -> str:
        """``text`` in a style of the table where ``stream`` (default stdout) shows colours, unchanged elsewhere."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self.colours(stream or self.stdout) else text

    def out(self, text: str = "", *, end: str = "\n") -> None:
        self.stdout.write(text + end)
        self.stdout.flush()

    def say(self, text: str, **facts: object) -> None:
        """Print a message; does nothing under --quiet. ``facts`` are keys of the JSON line."""
        if not self.settings.quiet:
            self._tell("info", text, facts)

    def warn(self, text: str, **facts: object) -> None:
        self._tell("warning", text, facts)

    def _tell(self, level: str, text: str, facts: dict[str, object]) -> None:
        self._end_progress()
        self._write(level, text, facts)

    def _write(self, level: str, text: str, facts: dict[str, object]) -> None:
        if self.settings.log_format == "json":
            line = json.dumps({"time": round(time.time(), 3), "level": level, "message": text, **facts})
        else:
            line = text if level == "info" else f"{self.paint(level, 'warn', self.stderr)}: {text}"
        self.stderr.write(line + "\n")
        self.stderr.flush()

    def fail(self, error: TriremeError) -> int:
        """Print an error in its three lines and return its exit code; the stack only under --debug."""
        if self.settings.debug:
            traceback.print_exception(error, file=self.stderr)
        if self.settings.log_format == "json":
            facts = {"why": error.why, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
            self._tell("error", error.what, {key: value for key, value in facts.items() if value})
            return error.exit_code
        for line in error.lines().splitlines():
            label, _, text = line.partition(": ")
            style = "error" if label == "error" else "hint" if label == "hint" else "dim"
            self.stderr.write(f"{self.paint(label, style, self.stderr)}: {text}\n")
        self.stderr.flush()
        return error.exit_code

    @contextmanager
    def progress(self, counted: Callable[[int], str] | None = None) -> Iterator[Progress]:
        """A callback that draws bars on a terminal and plain lines (phase, percent, seconds) elsewhere. ``counted`` formats the amount,
        None = bytes."""
        if self.settings.quiet:
            yield lambda phase, done, total: None
        elif self.settings.log_format == "text" and self.stderr.isatty():
            with self._draw(counted is None) as callback:
                yield callback
        else:
            self._lines = PlainProgress(lambda text: self._write("info", text, {}), amount=counted)
            try:
                yield self._lines
            finally:
                self._end_progress()

    @contextmanager
    def _draw(self, bytewise: bool) -> Iterator[Progress]:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        tasks: dict[str, Any] = {}

        def callback(phase: str, done: int, total: int) -> None:
            if self._bars is None:
                tasks.clear()
                amount = DownloadColumn() if bytewise else MofNCompleteColumn()
                columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
                self._bars = Bars(*columns, console=Terminal(file=self.stderr))
                self._bars.start()
            if phase not in tasks:
                tasks[phase] = self._bars.add_task(phase, total=total or None)
            self._bars.update(tasks[phase], completed=done, total=total or None)

        try:
            yield callback
        finally:
            self._end_progress()

    @contextmanager
    def following(self) -> Iterator[OutputFollower]:
        """For another program's log: prints its lines as they arrive, and one progress line of our own."""
        follower = OutputFollower(self)
        try:
            yield follower
        finally:
            follower.finish()

    def _end_progress(self) -> None:
        """Leave the drawn bars as they are, because other lines follow. Further progress is drawn below those lines."""
        if self._lines is not None:
            self._lines.finish()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class PlainProgress:
    """Progress for logs and pipes: one line when a phase ends, and now and then while it lasts."""

    def __init__(
        self, say: Callable[..., None], clock: Callable[[], float] = time.monotonic, amount: Callable[[int], str] | None = None
    ) -> None:
        self.say, self.clock, self.amount = say, clock, amount or size
        self.phase, self.done, self.total = "", 0, 0
        self.started = self.printed = clock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self.clock()
        if phase != self.phase:
            self.finish()
            self.phase, self.started, self.printed = phase, now, now
        self.done, self.total = done, total
        if now - self.printed >= PLAIN_EVERY_S:
            self.printed = now
            share = f"{100 * done // total} % of {self.amount(total)}" if total else self.amount(done)
            self.say(f"{phase}: {share}, {now - self.started:.1f} s")

    def finish(self) -> None:
        """Print the result of the current phase, if there is one."""
        if self.phase:
            self.say(f"{self.phase}: {self.amount(self.done)}, {self.clock() - self.started:.1f} s")
        self.phase = ""


class OutputFollower:
    """Prints lines of another program, dimmed; on a terminal the progress line stays below them and is redrawn."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = console.settings.log_format == "text" and console.stderr.isatty()
        self._state = ""
        self._told = clock()

    def line(self, text: str) -> None:
        if not self._console.settings.quiet:
            self._clear()
            self._console.say(self._console.paint(text, "dim", self._console.stderr))
            self._draw()

    def state(self, text: str) -> None:
        """``text`` is the current progress; in files and pipes it is printed only at intervals."""
        if self._console.settings.quiet:
            return
        self._clear()
        self._state = text
        self._draw()
        if not self._live and self._clock() - self._told >= FOLLOW_EVERY_S:
            self._told = self._clock()
            self._console.say(text)

    def finish(self) -> None:
        self._clear()
        self._state = ""

    def _clear(self) -> None:
        if self._live and self._state:
            self._console.stderr.write("\r\x1b[K")

    def _draw(self) -> None:
        if self._live and self._state:
            width = shutil.get_terminal_size().columns - 1
            self._console.stderr.write(self._state[:width])
            self._console.stderr.flush()


def size(count: int) -> str:
    """Bytes in readable form: ``98.4 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def age(seconds: float) -> str:
    """A duration in kubectl's format: ``45s``, ``12m``, ``3h``, ``5d``."""
    whole = max(0, int(seconds))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= 2 * length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned columns, three spaces apart, without lines, as kubectl prints them."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])
