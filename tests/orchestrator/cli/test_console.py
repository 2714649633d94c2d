"""The form of what the command line says."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from orchestrator.cli.console import Console, ConsoleSettings, OutputFollower, PlainProgress, age, size, table
from workers.protocol.errors import ConfigError, EnvironmentFault, ReplicaLost

FAULT = ConfigError("unknown key modles", "models is the nearest", "rename it")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(**settings: Any) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(ConsoleSettings(**settings), stdout=out, stderr=err), out, err


def test_an_error_is_three_lines_and_its_class_is_the_exit_code() -> None:
    terminal, out, err = console()
    assert terminal.fail(FAULT) == 3
    assert err.getvalue() == "error: unknown key modles\nwhy: models is the nearest\nhint: rename it\n"
    assert out.getvalue() == ""
    assert [terminal.fail(kind("x")) for kind in (EnvironmentFault, ReplicaLost)] == [4, 5]


def test_a_stack_is_shown_only_for_debugging() -> None:
    for debug in (False, True):
        terminal, _, err = console(debug=debug)
        try:
            raise FAULT
        except ConfigError as error:
            terminal.fail(error)
        assert ("Traceback" in err.getvalue()) is debug


def test_json_lines_carry_the_facts() -> None:
    terminal, _, err = console(log_format="json")
    terminal.say("ready", replica="tp2", seconds=3.5)
    terminal.fail(FAULT)
    ready, error = (json.loads(line) for line in err.getvalue().splitlines())
    assert (ready["level"], ready["message"], ready["replica"], ready["seconds"]) == ("info", "ready", "tp2", 3.5)
    assert (error["level"], error["message"], error["hint"], error["exit_code"]) == ("error", "unknown key modles", "rename it", 3)


def test_quiet_leaves_results_warnings_and_errors() -> None:
    terminal, out, err = console(quiet=True)
    terminal.say("working")
    with terminal.progress() as progress:
        progress("fetching", 1, 2)
    terminal.out("answer")
    terminal.warn("careful")
    assert (out.getvalue(), err.getvalue()) == ("answer\n", "warning: careful\n")


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = Console(ConsoleSettings(), stdout=Terminal(), stderr=io.StringIO())
    assert shown.paint("OK", "good") == "\x1b[32mOK\x1b[0m"
    assert Console(ConsoleSettings(), stdout=io.StringIO(), stderr=io.StringIO()).paint("OK", "good") == "OK"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown.paint("OK", "good") == "OK"


def test_a_bar_on_a_terminal_ends_full() -> None:
    out, err = io.StringIO(), Terminal()
    with Console(ConsoleSettings(), stdout=out, stderr=err).progress() as progress:
        progress("fetching", 0, 2_000_000)
        progress("fetching", 2_000_000, 2_000_000)
    assert "fetching" in err.getvalue() and "2.0/2.0 MB" in err.getvalue() and out.getvalue() == ""


def test_plain_progress_tells_each_phase_once_and_long_ones_now_and_then() -> None:
    told: list[str] = []
    now = 0.0
    progress = PlainProgress(told.append, lambda: now)
    progress("fetching", 0, 100)
    progress("fetching", 10, 100)
    now = 6.0
    progress("fetching", 50, 100)
    progress("converting", 0, 0)
    now = 7.0
    progress("converting", 2_500_000, 0)
    progress.finish()
    progress.finish()
    assert told == ["fetching: 50 % of 100 B, 6.0 s", "fetching: 50 B, 6.0 s", "converting: 2.5 MB, 1.0 s"]


def test_another_programs_log_flows_above_its_state() -> None:
    err = Terminal()
    terminal = Console(ConsoleSettings(), stdout=io.StringIO(), stderr=err)
    with terminal.following() as follower:
        follower.state("build: 0 of 2, 1 s")
        follower.line("[TRT] one")
        follower.state("build: 1 of 2, 2 s")
    shown = err.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert shown == "build: 0 of 2, 1 s\r\x1b[K[TRT] one\nbuild: 0 of 2, 1 s\r\x1b[Kbuild: 1 of 2, 2 s\r\x1b[K"


def test_in_a_file_the_state_is_told_now_and_then() -> None:
    now = [0.0]
    terminal, _, err = console()
    follower = OutputFollower(terminal, clock=lambda: now[0])
    for second in range(70):
        now[0] = float(second)
        follower.state(f"{second} s")
    follower.line("the log")
    assert err.getvalue().splitlines() == ["30 s", "60 s", "the log"]
    quiet, _, silent = console(quiet=True)
    with quiet.following() as follower:
        follower.line("the log")
        follower.state("1 s")
    assert silent.getvalue() == ""


def test_a_table_keeps_its_columns() -> None:
    assert (
        table(["NAME", "STATE"], [["tp2", "READY"], ["a-long-name", "LOST"]])
        == "NAME          STATE\ntp2           READY\na-long-name   LOST"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (180_000, "2d"), (-1, "0s")])
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (2_100_000_000, "2.1 GB")])
def test_size(count: int, text: str) -> None:
    assert size(count) == text
