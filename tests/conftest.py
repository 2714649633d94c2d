"""What all tests share: the marker `process`, the rules of a second run, and the measured figures at the end of a run.

With several pytest processes, each hands its figures to the first, and modules that wait are run beside modules that compute.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from functools import cache
from itertools import zip_longest
from types import ModuleType
from typing import Any

import pytest

from tests.support import figures

pytest_plugins = ["tests.support.second_run"]

#: A test module that uses one of these starts processes: all its tests are marked `process`.
STARTERS = ("subprocess", "multiprocessing", "signal", "tests.support.gang", "tests.support.router_process", "tests.support.deployment",
            "tests.support.browser", "tests.inputs.world", "tests.recorded.lines", "orchestrator.cli.doctor_checks")  # fmt: skip


@cache
def starts_processes(module: ModuleType) -> bool:
    """Whether a test module holds one of :data:`STARTERS`, or a name that one of them defines."""
    return any(
        (value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")) in STARTERS
        for value in vars(module).values()
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for item in items:
        if starts_processes(item.module) or item.get_closest_marker("mpi") or item.get_closest_marker("cluster"):
            item.add_marker("process")
    if hasattr(config, "workerinput"):
        items[:] = interleaved(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collected tests live to the end of the run, so the garbage collector does not look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def interleaved(items: list[pytest.Function]) -> list[pytest.Function]:
    """Tests module by module: in turn one that starts processes, and so mostly waits, and one that computes.

    ``--dist loadfile --no-loadscope-reorder`` hands modules out in this order: the cores have work from the first minute to the last.
    """
    modules: dict[str, list[pytest.Function]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    waiting = [tests for tests in modules.values() if any(test.get_closest_marker("process") for test in tests)]
    computing = [tests for tests in modules.values() if tests not in waiting]
    return [test for pair in zip_longest(waiting, computing, fillvalue=[]) for tests in pair for test in tests]


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
