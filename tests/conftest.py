"""What every test run shows: the figures that its tests measured."""

from __future__ import annotations

import pytest

from tests import figures


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.lines:
        terminalreporter.section("measured / bound")
        for line in figures.lines:
            terminalreporter.write_line(line)
