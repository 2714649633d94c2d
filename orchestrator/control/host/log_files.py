"""The log files of a deployment's run folder, read as one log: lines of all processes in the order of their times.

Owns its position in each file, nothing on the disk: it only reads. A line is text of other processes, so unprintable characters are
escaped.

    RUN/host.log up.log ray.log · RUN/routers/NAME.log · RUN/replicas/NAME/EPOCH/{rankN,mpiexec}.log
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from workers.epoch import started_at
from workers.protocol.errors import NotFound, printable

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (?:rank \d+ )?([A-Z]+) ([\w.]+): (.*)", re.DOTALL)
#: The time before a line without a logger: in `up.log` and `mpiexec.log`, or in brackets as Ray's C++ code writes it.
_TIMED = re.compile(r"(\[?)(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)[,.](\d{3})\d*(?:\s(.*)|$)", re.DOTALL)
_RANK = re.compile(r"rank(\d+)")
#: Longest part of a line that is shown, characters.
_WIDEST = 8192
#: Keys of a JSON line with their own place in the output; others follow the message.
_PLACED = frozenset(("time", "level", "logger", "message", "trace", "replica", "rank"))
#: Log files of the host process.
HOST_FILES = ("host.log", "up.log", "ray.log")


class LogEntry(msgspec.Struct, frozen=True):
    """One line. ``time``: Unix seconds, the line's own, or that of the previous line if it has none. ``level`` and ``logger`` are empty for
    a line without a logger."""

    time: float
    source: str
    level: str
    logger: str
    text: str


class LogFile(msgspec.Struct, frozen=True):
    """A file and its owner. ``owner``: replica, router or ``host``; ``rank`` and ``epoch``: of a rank, else -1 and 0."""

    path: Path
    owner: str
    label: str
    rank: int = -1
    epoch: int = 0


def deployments(run_dir: Path) -> list[str]:
    """Names of the deployments with logs under ``run_dir``."""
    kept = (*HOST_FILES, "replicas", "routers")
    return sorted(folder.name for folder in run_dir.glob("*") if any((folder / name).exists() for name in kept))


def find(home: Path, *, owner: str = "", rank: int | None = None, epoch: str = "last") -> list[LogFile]:
    """The log files in a deployment's run folder. ``owner``: a replica, a router, ``router`` for all of them, ``host``; empty = all.
    ``epoch``: ``last``, ``previous``, ``all`` or a number; it applies to replicas only. Raises :class:`NotFound` for an unknown owner."""
    found = [LogFile(home / name, "host", "host") for name in HOST_FILES if (home / name).exists()]
    found += [LogFile(path, path.stem, path.stem) for path in sorted((home / "routers").glob("*.log"))]
    names = {file.owner for file in found}
    for folder in sorted((home / "replicas").glob("*")):
        names.add(folder.name)
        epochs = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
        for number in _chosen(epochs, epoch):
            found += _gang(folder, number)
    routers = {path.stem for path in (home / "routers").glob("*.log")}
    wanted = routers if owner == "router" else {owner} if owner else names
    if owner and not wanted & names:
        raise NotFound(f"{home.name} has no logs of {owner!r}", f"it has {', '.join(sorted(names)) or 'none'}", f"trireme logs {home.name}")
    found = [file for file in found if file.owner in wanted and rank in (None, file.rank)]
    return [file for file in found if not (file.epoch == 0 and epoch not in ("last", "all"))]


def _chosen(epochs: list[int], wanted: str) -> list[int]:
    if wanted == "all":
        return epochs
    if wanted in ("last", "previous"):
        return epochs[-1:] if wanted == "last" else epochs[-2:-1]
    return [epoch for epoch in epochs if str(epoch) == wanted]


def _gang(folder: Path, epoch: int) -> list[LogFile]:
    files = []
    for path in (folder / str(epoch)).glob("*.log"):
        match = _RANK.fullmatch(path.stem)
        rank = int(match[1]) if match else -1
        label = f"{folder.name} rank {rank}" if match else f"{folder.name} {path.stem}"
        files.append(LogFile(path, folder.name, label, rank, epoch))
    return sorted(files, key=lambda file: (file.rank, file.label))


class LogReader:
    """One file, read from where the last call ended. A file that was truncated is read from its beginning."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._place = self._inode = 0
        self._time = started_at(file.epoch)

    def entries(self, *, final: bool) -> Iterator[LogEntry]:
        """The new lines; their times never decrease. ``final``: also return a last line without a line end. A removed file has no lines.

        Before the first line of a gang's leader, a line is added that names the launch.
        """
        try:
            stream = self.file.path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            status = os.fstat(stream.fileno())
            if status.st_ino != self._inode or status.st_size < self._place:
                self._place, self._inode = 0, status.st_ino
                if self.file.rank == 0:
                    yield LogEntry(self._time, self.file.label, "", "", f"launched, epoch {self.file.epoch}")
            stream.seek(self._place)
            if self.file.rank < 0 and not _has_times(stream):
                # These lines have no time; the last of them was written when the file was last modified.
                self._time = max(self._time, status.st_mtime)
            stream.seek(self._place)
            for line in stream:
                if not line.endswith(b"\n") and not final:
                    return
                self._place += len(line)
                entry = self._entry(line.decode(errors="replace").rstrip("\r\n"))
                if entry is not None:
                    yield entry

    def _entry(self, line: str) -> LogEntry | None:
        if not line:
            return None
        time, level, logger, text = _read_json(line) if line.startswith("{") else _read_text(line)
        self._time = max(self._time, time)
        return LogEntry(self._time, self.file.label, level, logger, "\n".join(map(printable, text[:_WIDEST].splitlines())))


def _has_times(stream: IO[bytes]) -> bool:
    """Whether one of the next lines has a time."""
    return any(line.startswith(b"{") or _read_text(line.decode(errors="replace"))[0] for line in islice(stream, 50))


def _read_text(line: str) -> tuple[float, str, str, str]:
    line = line.rstrip("\n")
    level = logger = ""
    if match := _STAMPED.fullmatch(line):
        stamp, thousandths, level, logger, text = match.groups()
    elif match := _TIMED.fullmatch(line):
        bracket, stamp, thousandths, text = match.groups()
        text = line if bracket else text or ""
    else:
        return 0.0, "", "", line
    try:
        return datetime.fromisoformat(f"{stamp}.{thousandths}").timestamp(), level, logger, text
    except ValueError:
        return 0.0, "", "", line


def _read_json(line: str) -> tuple[float, str, str, str]:
    """Parse a line of ``--log-format json``; a line in another format is shown unchanged."""
    try:
        row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        time = float(row["time"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return 0.0, "", "", line
    more = "".join(f" {key}={value}" for key, value in row.items() if key not in _PLACED)
    trace = f"\n{row['trace']}" if row.get("trace") else ""
    return time, str(row.get("level", "")), str(row.get("logger", "")), f"{row.get('message', '')}{more}{trace}"


def merge(readers: Iterable[LogReader], *, final: bool) -> Iterator[LogEntry]:
    """The new lines of all files, by time; lines of one file stay in their order."""
    return heapq.merge(*(reader.entries(final=final) for reader in readers), key=lambda entry: entry.time)
