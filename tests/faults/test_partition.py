"""F12: the wire between a router and one of two replicas is cut under load, for a moment and for long, and heals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.client import AsyncClient, Client
from orchestrator.config.router_spec import AdmissionSpec
from tests.faults.wire_cut import Wire
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeOptions, FakeSpec

pytestmark = pytest.mark.mpi
STREAMS, OUTPUT = 24, 250
ENGINE = FakeSpec(max_batch_size=64, options=FakeOptions(fake_step_ms=10.0))
SILENCE_S = 1.0
#: ZMTP's interval and time-out at both ends, and a little; the router's own limit on silence is below it.
BOUND_S = 0.5 + 1.5 + 0.3


class Watch:
    """What a router says of its replica ``left``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def row(self) -> dict[str, Any]:
        return next(row for row in self._client.status()["replicas"] if row["name"] == "left")

    def counts(self) -> dict[str, int]:
        return dict(self._client.status()["counts"])

    def until(self, condition: Callable[[dict[str, Any]], object], bound_s: float = 120.0) -> float:
        """Seconds until the router said so."""
        begin = time.monotonic()
        while not condition(row := self.row()):
            assert time.monotonic() - begin < bound_s, row
            time.sleep(0.02)
        return time.monotonic() - begin


async def ask_all(router: RouterRun, disturb: Callable[[], float]) -> float:
    """Every stream exact; returns what ``disturb`` measured when all had begun."""
    async with AsyncClient([router.spec.rpc], model="m") as client:
        begun = [asyncio.Event() for _ in range(STREAMS)]

        async def one(index: int) -> None:
            prompt, params = f"stream {index}", SamplingParams(max_tokens=OUTPUT, temperature=index % 2 * 0.8, seed=index)
            call = client.complete(prompt, max_tokens=OUTPUT, temperature=index % 2 * 0.8, seed=index, ignore_eos=True)
            tokens: list[int] = []
            async for piece in call.stream():
                assert piece.first == len(tokens), "a gap or a repeat"
                tokens += piece.tokens
                begun[index].set()
            assert tokens == expected_tokens(prompt.encode(), params), f"stream {index}"

        async with asyncio.TaskGroup() as group:
            for index in range(STREAMS):
                group.create_task(one(index))
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
            measured = await asyncio.to_thread(disturb)
    return measured


def test_a_partition_is_a_pause_and_its_late_tokens_are_dropped() -> None:
    with short_folder() as folder:
        admission = AdmissionSpec(replica_limit=100)
        with (
            RouterRun(folder, admission=admission, replica_timeout_s=SILENCE_S) as router,
            Wire(folder / "wire", folder / "router0.back") as wire,
            Gang(folder, [f"ipc://{folder}/wire"], name="left", tp=1, engine=ENGINE) as left,
            Gang(folder, [router.spec.back], name="right", tp=1, engine=ENGINE),
            Client([router.spec.rpc], model="m") as client,
        ):
            router.wait_serving()
            watch = Watch(client)
            deadline = time.monotonic() + 30
            while [row["state"] for row in client.status()["replicas"]] != ["ready", "ready"]:
                assert time.monotonic() < deadline

            def glitch() -> float:
                """Cut until the router has given the replica up, not a moment longer: its tokens come late, under an old attempt."""
                wire.cut()
                took = watch.until(lambda row: row["state"] == "lost", 10.0)
                wire.heal()
                watch.until(lambda row: row["state"] == "ready")
                return took

            for _ in range(5):
                took = asyncio.run(ask_all(router, glitch))
                figure("F12 partition -> detection", took, BOUND_S)
                if watch.counts()["stale_tokens"]:
                    break
            assert watch.counts()["stale_tokens"] > 0, "no token came late: the test proved nothing"

            def outage() -> float:
                """Cut until the replica has given the router up too: it cancels what it ran, and greets again."""
                begun = left.logs().count("the router is lost")
                wire.cut()
                took = watch.until(lambda row: row["state"] == "lost", 10.0)
                deadline = time.monotonic() + 20
                while left.logs().count("the router is lost") == begun:
                    assert time.monotonic() < deadline, "the leader does not notice"
                    time.sleep(0.02)
                wire.heal()
                figure("F12 heal -> replica ready again", watch.until(lambda row: row["state"] == "ready"), 3.0)
                return took

            figure("F12 long partition -> detection", asyncio.run(ask_all(router, outage)), BOUND_S)
            assert left.state.epoch == 1 and watch.row()["age_s"] < 60, "the same process came back"
            watch.until(lambda row: row["running"] == row["waiting"] == 0 and row["free_blocks"] == row["num_blocks"])
            counts = watch.counts()
            assert counts["resubmitted"] > 0 and counts["failed"] == 0
