"""What all tests share: the figures that they measured, at the end of a run. With several processes, each hands its own to the first."""

from __future__ import annotations

from typing import Any

import pytest

from tests import figures

#: Folders whose files take minutes each: processes that deal files out begin with them, so that none is left alone with one at the end.
LONG_FOLDERS = ("mpi", "cluster", "faults", "e2e", "inputs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    weight = {folder: place for place, folder in enumerate(LONG_FOLDERS)}
    items.sort(key=lambda item: weight.get(item.path.parent.name, len(weight)))


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
