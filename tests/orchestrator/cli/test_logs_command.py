"""`trireme logs`: many files read as one, in the order of their times, whatever process wrote them and whether it still runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO, cast

import pytest

from orchestrator.cli.console import Console, ConsoleSettings
from orchestrator.cli.hosting import TimedLines, UntimedLines
from orchestrator.cli.logs import begin
from orchestrator.cli.main import run
from orchestrator.control.host import log_files
from orchestrator.control.host.log_files import LogReader, find
from tests.support.gang import wait_for
from workers.protocol.errors import NotFound, Rejected

T0 = datetime(2026, 11, 22, 10, 0, 0).timestamp()


def epoch(seconds: float) -> int:
    return int((T0 + seconds) * 1000) << 16 | 7


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds).isoformat(" ", "milliseconds").replace(".", ",")


def line(seconds: float, text: str, *, rank: int | None = None, level: str = "INFO") -> str:
    return f"{stamp(seconds)} {f'rank {rank} ' if rank is not None else ''}{level} trireme.x: {text}\n"


OLD, NEW = epoch(-100), epoch(0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """One deployment: a gang of two ranks in its second launch, a router with JSON lines, a host."""
    home = tmp_path / "run" / "chat"
    for number in (OLD, NEW):
        (home / "replicas" / "left" / str(number)).mkdir(parents=True)
    (home / "replicas" / "left" / str(OLD) / "rank0.log").write_text(line(-90, "the old one", rank=0))
    gang = home / "replicas" / "left" / str(NEW)
    trace = "Traceback (most recent call last):\n  File x\nValueError: no\n"
    (gang / "rank0.log").write_text(
        "before logging\n" + line(1, "first", rank=0) + line(5, "fell", rank=0, level="ERROR") + trace + line(9, "last", rank=0)
    )
    (gang / "rank1.log").write_text(line(3, "third", rank=1))
    (gang / "mpiexec.log").write_text("mpiexec returned 0\n")
    os.utime(gang / "mpiexec.log", (T0 + 20, T0 + 20))
    (home / "routers").mkdir()
    row = {"time": T0 + 4, "level": "WARNING", "logger": "trireme.router", "message": "fourth \x1b[31m", "request_id": "r-1"}
    (home / "routers" / "router0.log").write_text(json.dumps(row) + "\n{broken\n")
    (home / "host.log").write_text(line(2, "second"))
    return tmp_path / "run"


def told(run_dir: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert run(["logs", *words, "--run-dir", str(run_dir)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def test_lines_of_all_processes_stand_in_the_order_of_their_times(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(run_dir, capsys)
    words = [row.partition("trireme.x: ")[2] or row.rpartition("  ")[2].strip() for row in shown]
    order = [
        next(i for i, row in enumerate(shown) if word in row) for word in ("launched", "first", "second", "third", "fourth", "fell", "last")
    ]
    assert order == sorted(order), words
    assert shown[order[1]].startswith("2026-11-22 10:00:01.000 left rank 0") and "INFO" in shown[order[1]]
    assert "left rank 1" in shown[order[3]] and "host" in shown[order[2]]
    assert "WARNING trireme.router: fourth \\x1b[31m request_id=r-1" in shown[order[4]], "a line cannot colour the terminal"
    fell = order[5]
    assert [row.split("left rank 0 ")[1].strip() for row in shown[fell + 1 : fell + 4]] == [
        "Traceback (most recent call last):", "File x", "ValueError: no",
    ], "a stack stays together"  # fmt: skip
    assert "mpiexec returned 0" in shown[-1] and "10:00:20" in shown[-1], "a file without times stands where it was written"
    assert not any("the old one" in row for row in shown)


def test_what_the_daemon_printed_stands_where_it_was_printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`up.log`: lines that no logger wrote, each with its time before it; a stack trace has the time of the line before. So `mpiexec.log`,
    and Ray's own lines in `ray.log`. The times of the files say nothing."""
    home = run_dir / "chat"
    trace = "A stack:\n  File y\n"
    (home / "up.log").write_text(f"{stamp(2.5)} replica left: ready\n{stamp(6)} \n{trace}{stamp(7)} left is lost\n")
    (home / "ray.log").write_text(f"[{stamp(2.7)} E 12 34] (raylet) slow\n")
    (home / "replicas" / "left" / str(NEW) / "mpiexec.log").write_text(f"{stamp(8)} no slot\n{stamp(9.5)} mpiexec returned 1\n")
    shown = told(run_dir, capsys)
    words = ["second", "left: ready", "slow", "third", "A stack", "File y", "left is lost", "no slot", ": last", "returned 1"]
    order = [next(i for i, row in enumerate(shown) if word in row) for word in words]
    assert order == sorted(order), shown
    assert shown[order[1]] == f"{stamp(2.5).replace(',', '.')} host         replica left: ready"
    late = told(run_dir, capsys, "--since", "2026-11-22 10:00:06.5")
    assert any("left is lost" in row for row in late) and not any("left: ready" in row or "File y" in row for row in late)


def test_a_daemon_writes_times_that_a_person_who_waits_does_not_see() -> None:
    file, terminal = io.StringIO(), io.StringIO()
    console = Console(ConsoleSettings(), stderr=cast("IO[str]", TimedLines(file)))
    console.say("first\n  and below")
    console.fail(Rejected("no", "because"))
    Console(ConsoleSettings(log_format="json"), stderr=cast("IO[str]", TimedLines(file))).say("last")
    rows = [log_files._read_json(row) if row.startswith("{") else log_files._read_text(row) for row in file.getvalue().splitlines()]
    assert [row[3] for row in rows] == ["first", "  and below", "error: no", "why: because", "last"]
    assert all(abs(row[0] - time.time()) < 60 for row in rows)
    shown = UntimedLines(terminal)
    for letter in file.getvalue():
        shown.write(letter)
    assert terminal.getvalue().startswith("first\n  and below\nerror: no\nwhy: because\n{")


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["left"], "first", "fourth"),
        (["chat", "left", "--rank", "1"], "third", "first"),
        (["chat/router"], "fourth", "first"),
        (["router0"], "fourth", "second"),
        (["host"], "second", "first"),
        (["chat", "--epoch", "previous"], "the old one", "first"),
        (["left", "--epoch", "all"], "the old one", "fourth"),
        (["--epoch", str(OLD)], "the old one", "second"),
        (["--since", "2026-11-22T10:00:04.500"], "fell", "third"),
        (["--tail", "2"], "last", "fell"),
    ],
)
def test_less_than_all_of_it(run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], some: str, none: str) -> None:
    shown = "\n".join(told(run_dir, capsys, *words))
    assert some in shown and none not in shown


def test_what_is_not_there_is_named(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["rihgt"], "it has host, left, router0"), (["other", "left"], "there is chat"), (["a", "b", "c"], "too many names"),
        (["--since", "yesterday"], "is not a time"), (["--epoch", "first"], "is not an epoch"), (["left", "--rank", "7"], "no log of left"),
    ):  # fmt: skip
        assert run(["logs", *words, "--run-dir", str(run_dir)]) == 2
        assert why in capsys.readouterr().err
    assert run(["logs", "--run-dir", str(tmp_path / "empty")]) == 2
    assert "there are no logs" in capsys.readouterr().err


def test_a_span_counts_back_from_now() -> None:
    assert (begin("90s", 1000.0), begin("1.5m", 1000.0), begin("", 1000.0)) == (910.0, 910.0, 0.0)
    with pytest.raises(Rejected):
        begin("10", 0.0)


def test_a_reader_goes_on_where_it_was(run_dir: Path) -> None:
    (file,) = find(run_dir / "chat", owner="left", rank=1)
    reader = LogReader(file)
    assert [entry.text for entry in reader.entries(final=False)] == ["third"]
    with file.path.open("a") as out:
        out.write(line(6, "more", rank=1) + "half a li")
    assert [entry.text for entry in reader.entries(final=False)] == ["more"]
    assert list(reader.entries(final=False)) == []
    assert [entry.text for entry in reader.entries(final=True)] == ["half a li"]
    file.path.write_text(line(7, "again", rank=1))
    assert [entry.text for entry in reader.entries(final=False)] == ["again"], "begun again"
    file.path.unlink()
    assert list(reader.entries(final=False)) == []
    with pytest.raises(NotFound):
        find(run_dir / "chat", owner="nobody")


def test_a_launch_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.touch()
    reader = LogReader(log_files.LogFile(path, "left", "left rank 0", 0, NEW))
    assert [(entry.text, entry.time) for entry in reader.entries(final=False)] == [(f"launched, epoch {NEW}", T0)]
    assert list(reader.entries(final=False)) == []


def test_times_never_fall_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.write_text(line(5, "a") + line(3, "the clock was set back") + "x" * 20_000 + "\n")
    entries = list(log_files.merge([LogReader(log_files.LogFile(path, "left", "left rank 1", 1, NEW))], final=True))
    assert [entry.time - T0 for entry in entries] == [5, 5, 5]
    assert len(entries[2].text) == 8192, "bounded"


def test_following_goes_across_a_relaunch(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "told"
    command = [sys.executable, "-m", "trireme", "logs", "left", "-f", "--tail", "1", "--run-dir", str(run_dir)]
    with out.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "mpiexec returned 0" in out.read_text(), what="what was there")
        gang = run_dir / "chat" / "replicas" / "left"
        with (gang / str(NEW) / "rank1.log").open("a") as log:
            log.write(line(30, "last words", rank=1))
        next_one = gang / str(epoch(31))
        next_one.mkdir()
        (next_one / "rank0.log").write_text(line(32, "the new gang", rank=0))
        wait_for(lambda: "the new gang" in out.read_text() and "last words" in out.read_text(), what="what came")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)
    rows = out.read_text().splitlines()
    assert f"launched, epoch {epoch(31)}" in out.read_text() and sum("the new gang" in row for row in rows) == 1
    assert not any("first" in row for row in rows)
