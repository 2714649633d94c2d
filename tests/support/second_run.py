"""The rules of `make test` for a test that failed beside others: at most two may run once more, alone, and each is counted and named.

A pytest plugin. Its flag stands beside ``--last-failed``, which picks the tests.
"""

from __future__ import annotations

import pytest

#: So many tests of a run may pass alone only. More of them are no accident of one moment.
MOST = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"With --last-failed: refuse more than {MOST} tests, and list those that pass now. `make test` sets it."
    parser.addoption("--second-run", action="store_true", help=text)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("second_run") and len(session.items) > MOST:
        pytest.exit(f"{len(session.items)} tests failed, and at most {MOST} may run a second time: none does", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    if passed and terminalreporter.config.getoption("second_run"):
        terminalreporter.write_line(
            f"{len(passed)} of at most {MOST} tests passed only when run again alone: {', '.join(passed)}", yellow=True
        )
