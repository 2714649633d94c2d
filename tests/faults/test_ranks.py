"""F01 to F06, F25, F26 and F30 on the portable engine: two replicas of two ranks and one of two stages, fixed shapes, answers bit by bit.

The oracle is the same deployment undisturbed. What takes one layout for granted shows: a request may go on at another depth of pipeline.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.launch.subprocesses import alive
from tests.faults.stage import HANG_S, NEXT_TOKEN_S, Healed, Stage, staged
from tests.faults.streams import Case, Choice, counts, run_all, warm
from tests.support.figures import figure
from tests.support.tiny_models import tiny_model

pytestmark = [pytest.mark.mpi, pytest.mark.long, pytest.mark.timeout(900)]
OUTPUT = 96
BEGUN = 600
GRAMMAR = "[a-z ]{60}"


def cases() -> list[Case]:
    """16 greedy and 16 sampled streams over both doors, and one of every kind that keeps state of its own."""
    found = []
    for index in range(32):
        sampled = {"temperature": 0.8, "top_p": 0.9} if index % 2 else {"temperature": 0.0}
        found.append((f"request {index}", sampled, ("http", "rpc", "rpc ids", "http")[index // 2 % 4]))
    kinds: list[dict[str, Any]] = [
        {"n": 2, "temperature": 0.9}, {"logprobs": 3, "temperature": 0.7}, {"guided_regex": GRAMMAR}, {"presence_penalty": 1.5},
        {"repetition_penalty": 1.3, "min_p": 0.02, "temperature": 1.1}, {"top_k": 5, "temperature": 1.5},
    ]  # fmt: skip
    found += [(f"kind {index}", kind, "rpc") for index, kind in enumerate(kinds)]
    body = {"max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0.0}
    return [
        Case(prompt=prompt, body=body | {"seed": index} | extra, door=door, plain=False)
        for index, (prompt, extra, door) in enumerate(found)
    ]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    replicas = [{"name": "left", "tp_size": 2}, {"name": "right", "tp_size": 2}, {"name": "deep", "tp_size": 2, "pp_size": 2}]
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        model = tiny_model(Path(folder) / "tiny", max_position=1024)
        with staged(
            path=str(model), engine="portable", fixed_shape=True, max_seq_len=1024, kv_tokens=16384, max_num_tokens=64, max_batch_size=32,
            replicas=replicas, deployment={"cache_dir": f"{folder}/cache"}, module="tests.faults.host",
        ) as stage:  # fmt: skip
            yield stage


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> list[list[Choice]]:
    return asyncio.run(run_all(stage.status, cases(), lambda: None, enough=1)).answers


def test_when_all_replicas_die_requests_wait_for_the_next(stage: Stage, undisturbed: list[list[Choice]]) -> None:
    """F26: no replica lives for a while, no router is restarted, and every stream goes on."""
    status = stage.ready()
    routers = status.routers

    def kill_all() -> float:
        at = time.monotonic()
        for name in ("left", "right", "deep"):
            os.kill(stage.pid(name, 1), signal.SIGKILL)
        return at

    run = asyncio.run(run_all(status, cases(), kill_all, enough=BEGUN))
    assert run.answers == undisturbed
    figure("F26 all replicas killed -> next token at the client", run.arrivals.pause(run.verdict, run.verdict + 5.0), 10.0)
    assert stage.ready().routers == routers


def hit(replica: str, rank: int, number: signal.Signals = signal.SIGKILL) -> Callable[[Stage], Healed]:
    return lambda stage: stage.heal(stage.strike(replica, stage.pid(replica, rank), number))


def hit_mpiexec(replica: str, number: signal.Signals) -> Callable[[Stage], Healed]:
    return lambda stage: stage.heal(stage.strike(replica, stage.mpiexec(replica), number))


#: What happens -> what does it, the bounds of noticing it and of the pause that it makes. The victims alternate.
FAULTS: dict[str, tuple[Callable[[Stage], Healed], float, float]] = {
    "F01 tp rank killed": (hit("left", 1), 0.5, NEXT_TOKEN_S),
    "F02 last stage killed": (hit("deep", 3), 0.5, NEXT_TOKEN_S),
    "F05 leader killed": (hit("right", 0), 0.5, NEXT_TOKEN_S),
    "F03 rank stopped": (hit("left", 1, signal.SIGSTOP), HANG_S, HANG_S),
    "F04 rank spins": (hit("deep", 2, signal.SIGUSR1), HANG_S, HANG_S),
    "F05 leader stopped": (hit("right", 0, signal.SIGSTOP), 1.5, HANG_S),
    "F04 leader spins": (hit("left", 0, signal.SIGUSR1), 1.5, HANG_S),
    "F06 mpiexec killed": (hit_mpiexec("deep", signal.SIGKILL), 0.5, NEXT_TOKEN_S),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_answers_are_those_of_an_undisturbed_run(stage: Stage, undisturbed: list[list[Choice]], what: str) -> None:
    disturb, detection, next_token = FAULTS[what]
    status = stage.ready()
    warm(status)
    before = asyncio.run(counts(status))
    run = asyncio.run(run_all(status, cases(), lambda: disturb(stage), enough=BEGUN))
    after = asyncio.run(counts(status))
    assert after["resubmitted"] > before["resubmitted"], "it hit nobody: the test proved nothing"
    assert run.answers == undisturbed
    strike = run.verdict.strike
    run.verdict.figures(what, run.arrivals.pause(strike.at, strike.lost), detection=detection, next_token=next_token)
    assert "LOADING" in run.verdict.phases and stage.ready(), run.verdict.phases
    assert stage.row(strike.old.name).cause, "nobody says why"


def test_a_rank_that_dies_in_prefill(stage: Stage, undisturbed: list[list[Choice]]) -> None:
    """F02: long prompts, 64 tokens a step; the kill comes while a prompt is half computed."""
    status = stage.ready()
    prompts = [Case(prompt="long " * 100 + str(index), body=case.body, door="rpc", plain=False) for index, case in enumerate(cases()[:16])]
    quiet = asyncio.run(run_all(status, prompts, lambda: None, enough=1)).answers

    def mid_prefill() -> Healed:
        deadline = time.monotonic() + 30
        while not stage.seen("left")["prefill_tokens"]:
            assert time.monotonic() < deadline, "no prompt is being computed there"
        return stage.heal(stage.strike("left", stage.pid("left", 1)))

    again = [Case(prompt=f"{index} " + case.prompt[2:], body=case.body, door="rpc", plain=False) for index, case in enumerate(prompts)]
    run = asyncio.run(run_all(status, again, mid_prefill, enough=1))
    assert asyncio.run(run_all(status, again, lambda: None, enough=1)).answers == run.answers
    assert asyncio.run(run_all(status, prompts, lambda: None, enough=1)).answers == quiet
    run.verdict.figures("F02 rank killed in prefill", None)
    assert f"rank 1 (pid {run.verdict.strike.old.pids[1][2]})" in stage.row("left").cause


def test_mpiexec_told_to_end_drains_and_one_that_is_stopped_is_not_missed(stage: Stage, undisturbed: list[list[Choice]]) -> None:
    """F06: SIGSTOP changes nothing, for ranks do not write through it; SIGTERM reaches the leader, which drains."""
    status = stage.ready()
    launcher = stage.mpiexec("right")
    run = asyncio.run(run_all(status, cases(), lambda: os.kill(launcher, signal.SIGSTOP), enough=BEGUN))
    assert run.answers == undisturbed and stage.row("right").state == "READY"
    os.kill(launcher, signal.SIGCONT)

    old = stage.row("right")

    def end() -> float:
        at = time.monotonic()
        os.kill(launcher, signal.SIGTERM)
        return at

    run = asyncio.run(run_all(status, cases(), end, enough=BEGUN))
    assert run.answers == undisturbed
    figure("F06 mpiexec SIGTERM -> longest pause at a client", run.arrivals.pause(run.verdict, run.verdict + 30), NEXT_TOKEN_S)
    stage.ready()
    assert stage.row("right").epoch > old.epoch


def test_a_stopped_rank_that_goes_on_later_is_nobody(stage: Stage, undisturbed: list[list[Choice]]) -> None:
    """F03: the gang of a stopped rank is gone whole; SIGCONT finds no process, and nothing of the old epoch is heard."""
    status = stage.ready()
    victim = stage.pid("left", 1)
    run = asyncio.run(run_all(status, cases(), lambda: hit("left", 1, signal.SIGSTOP)(stage), enough=BEGUN))
    assert not alive(victim)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, signal.SIGCONT)
    assert run.answers == undisturbed
    assert stage.seen("left")["epoch"] > run.verdict.strike.old.epoch


def test_a_death_while_loading_is_seen_at_once(stage: Stage) -> None:
    """F25: not the start's time-out. The successor of a killed gang is killed while it loads."""
    stage.ready()
    old = stage.row("deep")
    os.kill(stage.pid("deep", 1), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (row := stage.row("deep")).state != "LOADING" or row.epoch <= old.epoch or not row.pids:
        assert time.monotonic() < deadline, row
    at = time.monotonic()
    os.kill(row.pids[2][2], signal.SIGKILL)
    while (now := stage.row("deep")).state == "LOADING" and now.epoch == row.epoch:
        assert time.monotonic() < at + 30, now
    figure("F25 killed while loading -> noticed", time.monotonic() - at, 1.0)
    assert f"rank 2 (pid {row.pids[2][2]})" in stage.row("deep").cause
    stage.ready()
