"""What all tests share: the figures that they measured, at the end of a run. With several processes, each hands its own to the first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import figures


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["figures"] = figures.lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    figures.lines += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.lines:
        terminalreporter.section("measured / bound")
        for line in figures.lines:
            terminalreporter.write_line(line)
