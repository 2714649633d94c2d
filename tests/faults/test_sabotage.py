"""F01, F04, F21, F23 on the portable engine: two replicas of two ranks, fixed shapes, the default limit on what a request may end."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import DeploymentStatus
from tests.faults.saboteur import HUNGRY, NAN, NAN_FROM, OOM
from tests.faults.stage import HANG_S, NEXT_TOKEN_S, Healed, Stage, staged
from tests.faults.streams import Case, Choice, counts, run_all
from tests.support.deployment import MODEL
from tests.support.gang import wait_for
from tests.support.tiny_models import tiny_model
from workers.protocol.errors import EngineFault, ReplicaLost, TriremeError

pytestmark = pytest.mark.mpi
OUTPUT = 64
BEGUN = 120


def cases(count: int = 16) -> list[Case]:
    """Half greedy, half sampled; half over HTTP, half over RPC."""
    kinds: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9})
    body = {"max_tokens": OUTPUT, "ignore_eos": True}
    return [
        Case(
            prompt=f"request {index}",
            body=body | {"seed": index} | kinds[index % 2],
            door=("rpc", "rpc", "http", "http")[index % 4],
            plain=False,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        model = tiny_model(Path(folder) / "tiny", max_position=512)
        with staged(
            path=str(model), engine="portable", fixed_shape=True, max_seq_len=512, kv_tokens=8192, max_num_tokens=64, max_batch_size=32,
            deployment={"cache_dir": f"{folder}/cache", "admission": {}}, module="tests.faults.host",
        ) as stage:  # fmt: skip
            yield stage


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> list[list[Choice]]:
    return asyncio.run(run_all(stage.status, cases(), lambda: None, enough=1)).answers


async def poisoned(status: DeploymentStatus, prompt: str, seed: int) -> TriremeError:
    """How a request ends that is not to succeed."""
    async with AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as client:
        call = client.complete(prompt, max_tokens=OUTPUT, ignore_eos=True, temperature=0.0, seed=seed)
        with pytest.raises(TriremeError) as caught:
            await call.result()
    return caught.value


@pytest.mark.parametrize(("what", "seed"), [("killed", OOM), pytest.param("out of address space", HUNGRY, marks=pytest.mark.long)])
def test_a_request_that_ends_two_replicas_is_not_given_a_third(stage: Stage, undisturbed: list[list[Choice]], what: str, seed: int) -> None:
    """F23: the poison fails after two replicas, and everybody who ran beside it, on both, goes on exactly."""
    status = stage.ready()
    before = asyncio.run(counts(status))
    epochs = {name: stage.row(name).epoch for name in ("left", "right")}

    def poison() -> TriremeError:
        return asyncio.run(poisoned(status, f"poison that is {what}", seed))

    run = asyncio.run(run_all(status, cases(), poison, enough=BEGUN))
    assert isinstance(run.verdict, ReplicaLost) and run.verdict.code == "replica_limit", run.verdict
    assert run.answers == undisturbed
    stage.ready()
    after = asyncio.run(counts(status))
    assert after["failed"] == before["failed"] + 1 and after["replicas_lost"] == before["replicas_lost"] + 2
    causes = []
    for name, epoch in epochs.items():
        row = stage.row(name)
        assert row.epoch > epoch, "the poison ran on both"
        causes.append(row.cause)
    assert all("rank 1 (pid" in cause for cause in causes), causes


def hit(stage: Stage, replica: str, number: signal.Signals) -> Healed:
    return stage.heal(stage.strike(replica, stage.pid(replica, 1), number))


@pytest.mark.parametrize(
    ("what", "replica", "number", "bound"),
    [
        ("F01 rank killed", "left", signal.SIGKILL, NEXT_TOKEN_S),
        ("F04 rank spins with the interpreter's lock", "right", signal.SIGUSR1, HANG_S),
    ],
)
def test_a_fault_of_one_rank_is_a_pause(
    stage: Stage, undisturbed: list[list[Choice]], what: str, replica: str, number: signal.Signals, bound: float
) -> None:
    status = stage.ready()
    before = asyncio.run(counts(status))
    run = asyncio.run(run_all(status, cases(), lambda: hit(stage, replica, number), enough=BEGUN))
    after = asyncio.run(counts(status))
    assert after["resubmitted"] > before["resubmitted"], "it hit nobody: the test proved nothing"
    assert run.answers == undisturbed
    strike = run.verdict.strike
    detection = bound if bound == HANG_S else 0.5
    run.verdict.figures(what, run.arrivals.pause(strike.at, strike.lost), detection=detection, next_token=bound)
    cause = stage.row(replica).cause
    assert "no progress" in cause if bound == HANG_S else f"rank 1 (pid {strike.old.pids[1][2]})" in cause, cause


def test_logits_that_are_not_numbers_end_one_request(stage: Stage, undisturbed: list[list[Choice]]) -> None:
    """F21: its mates are exact, HTTP and RPC say ``nan_logits``; the third within a minute has the replica spared until it is alone."""
    status = stage.ready()

    def spoil() -> TriremeError:
        return asyncio.run(poisoned(status, "spoilt", NAN))

    run = asyncio.run(run_all(status, cases(), spoil, enough=BEGUN))
    assert run.answers == undisturbed
    assert isinstance(run.verdict, EngineFault) and run.verdict.code == "nan_logits", run.verdict
    assert f"output position {NAN_FROM}" in str(run.verdict)

    body = {"model": MODEL, "prompt": "spoilt", "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True, "stream": True}
    for seed in range(NAN + 1, NAN + 6):
        lines = httpx.post(f"{status.url}/v1/completions", json=body | {"seed": seed}, timeout=60, trust_env=False).text.split("\n\n")
        events = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines if line]
        assert [event["error"]["code"] for event in events if "error" in event] == ["nan_logits"] and "error" in events[-1]
        if spared := [row for row in stage.router()["replicas"] if row["quarantined"]]:
            break
    assert len(spared) == 1 and asyncio.run(counts(status))["quarantines"] == 1
    name = spared[0]["name"]
    other = next(row["name"] for row in stage.router()["replicas"] if row["name"] != name)
    before = stage.seen(other)["output_tokens_total"]
    assert asyncio.run(run_all(status, cases(), lambda: None, enough=1)).answers == undisturbed
    whole = OUTPUT * len(cases())
    wait_for(
        lambda: stage.seen(other)["output_tokens_total"] >= before + whole, 5.0, "all tokens from the replica that is not in quarantine"
    )
    row = stage.row(name)
    assert row.state == "QUARANTINED" and "not finite" in row.cause
    # It is taken as soon as nobody else is there: the request itself may have been at fault.
    alone = asyncio.run(run_all(status, cases(4), lambda: os.kill(stage.pid(other, 1), signal.SIGKILL), enough=8))
    assert alone.answers == undisturbed[:4]
    # A drain, as the status table hints, replaces it.
    stage.control.drain(name)
    stage.ready()
