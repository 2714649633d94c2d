"""F31: processes of a host are frozen (SIGSTOP) for longer than every bound of silence, then go on: nothing that lives counts as dead.

A paused virtual machine is the case of all processes. Where judges alone are frozen, their peers went on meanwhile: what the judges
then hear counts, not how long they heard nothing. Tokens are the oracle's; a gang that was replaced shows by its epoch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.faults.stage import Stage, staged
from tests.faults.streams import Case, Choice, run_all
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

pytestmark = pytest.mark.mpi
#: Silence counts as death after 1 s here, a step as hung after 2 s.
BRIEF_S, FROZEN_S, LONG_S = 5.0, 12.0, 60.0
#: So long everybody may still come to a wrong conclusion: the poller's bound for gangs that no router knows is 10 s.
AFTERWARDS_S = 3.0
OUTPUT, STREAMS = 400, 8


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(fake_step_ms=20) as stage:
        yield stage


def everything() -> list[int]:
    """The deployment's processes: host, routers and their sandbox workers, mpiexec and its proxies, ranks."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def freeze(pids: list[int], seconds: float) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def epochs(stage: Stage) -> dict[str, int]:
    return {name: stage.row(name).epoch for name in ("left", "right")}


def check_nothing_is_lost(stage: Stage, before: dict[str, int], *, seconds: float = AFTERWARDS_S) -> None:
    """The same gangs serve, and go on serving."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert epochs(stage) == before
        time.sleep(0.05)
    assert stage.ready().state == "READY"
    assert {row["name"]: (row["state"], row["epoch"]) for row in stage.router()["replicas"]} == {
        name: ("ready", epoch) for name, epoch in before.items()
    }


def cases() -> list[Case]:
    body = {"max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
    return [Case(prompt=f"frozen {index}", body=body, params=params, door="http") for index in range(STREAMS)]


def expected() -> list[list[Choice]]:
    tokens = [expected_tokens(case.prompt.encode(), case.params) for case in cases()]
    return [[Choice(tokens=found, text=bytes(found).decode(), reason="length")] for found in tokens]


def routers(stage: Stage) -> list[int]:
    """Each router with its sandbox workers."""
    pids = list(stage.status.routers.values())
    return pids + [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]


def host(stage: Stage) -> list[int]:
    """The process that judges gangs."""
    return [psutil.Process(next(iter(stage.status.routers.values()))).ppid()]


@pytest.mark.parametrize("seconds", [FROZEN_S, pytest.param(LONG_S, marks=pytest.mark.long)])
def test_no_idle_gang_is_lost(stage: Stage, seconds: float) -> None:
    stage.ready()
    before = epochs(stage)
    freeze(everything(), seconds)
    check_nothing_is_lost(stage, before)


@pytest.mark.parametrize("seconds", [BRIEF_S, pytest.param(LONG_S, marks=pytest.mark.long)])
def test_what_runs_goes_on_exactly(stage: Stage, seconds: float) -> None:
    status = stage.ready()
    before = epochs(stage)
    run = asyncio.run(run_all(status, cases(), lambda: freeze(everything(), seconds), enough=10 * STREAMS))
    assert run.answers == expected()
    check_nothing_is_lost(stage, before)


@pytest.mark.parametrize("judges", [routers, pytest.param(host, marks=pytest.mark.long)])
def test_a_judge_that_was_frozen_alone_judges_its_peers_right(stage: Stage, judges: object) -> None:
    status = stage.ready()
    assert callable(judges)
    before, pids = epochs(stage), judges(stage)
    run = asyncio.run(run_all(status, cases(), lambda: freeze(pids, BRIEF_S), enough=10 * STREAMS))
    assert run.answers == expected()
    check_nothing_is_lost(stage, before)


@pytest.mark.long
def test_after_a_freeze_a_hung_rank_is_found_as_before(stage: Stage) -> None:
    status = stage.ready()
    freeze(everything(), BRIEF_S)
    run = asyncio.run(run_all(status, cases(), lambda: stage.strike("left", stage.pid("left", 1), signal.SIGSTOP), enough=10 * STREAMS))
    assert run.answers == expected()
    assert 2.0 <= run.verdict.detection <= 10.0, "the bound is 2 s of a running judge, and a loaded machine"
    stage.heal(run.verdict)
