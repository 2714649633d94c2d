"""`make soak`: mixed load over both doors with a random fault every 20 s: nothing lost, every answer exact, nothing left, no growth.

    SOAK_SECONDS=600 SOAK_SEED=1 python -m tests.load.soak

FakeEngine behind two routers. A fault is injected when all is well again after the last one, so one replica lives at every moment. An HTTP
request that its router's death cut is asked again, as its client would; an RPC call is not: its client goes on by itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
from tests.load.growth import Growth
from tests.load.report import Report, percentile, say
from tests.load.traces import Traces
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from tests.support.ports import free_ports
from workers.engines.fake import expected_tokens
from workers.protocol.errors import Cancelled
from workers.protocol.messages import SamplingParams

EVERY_S, RECOVERY_S = 20.0, 60.0
HTTP_ASKERS, RPC_ASKERS = 10, 10
LONGEST_GAP_S = 10.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Ids are printable bytes, so text and ids are the same thing. ``leave_after``: tokens, 0 = stay to the end."""

    prompt: str
    params: SamplingParams
    n: int = 1
    stream: bool = True
    leave_after: int = 0

    @property
    def body(self) -> dict[str, Any]:
        return {
            "max_tokens": self.params.max_tokens, "temperature": self.params.temperature, "seed": self.params.seed, "n": self.n,
            "ignore_eos": True,
        }  # fmt: skip

    def expected(self) -> list[str]:
        seeds = [self.params.seed + choice for choice in range(self.n)]
        prompt = self.prompt.encode()
        return [bytes(expected_tokens(prompt, msgspec.structs.replace(self.params, seed=seed))).decode() for seed in seeds]


def draw(chance: random.Random, name: str) -> Case:
    """A request of any kind, with a prompt of its own or one that begins like many others."""
    shared = "You are a helpful assistant that answers in one sentence. " * chance.choice((0, 0, 1, 4))
    params = SamplingParams(
        max_tokens=chance.randrange(20, 150), temperature=chance.choice((0.0, 0.8)), seed=chance.randrange(1 << 30), ignore_eos=True
    )
    return Case(
        prompt=f"{shared}{name} {chance.randrange(1 << 30)}", params=params, n=chance.choice((1, 1, 1, 2)),
        stream=chance.random() < 0.7, leave_after=chance.choice((0, 0, 0, 0, 0, 10)),
    )  # fmt: skip


class Load:
    """All askers. ``wrong`` holds what no client should ever see."""

    def __init__(self, status: DeploymentStatus, until: float) -> None:
        self._status, self._until = status, until
        self.counts = Counter[str]()
        self.wrong: list[str] = []
        self.gaps: list[float] = []

    async def run(self) -> None:
        async with (
            AsyncClient([address.endpoint for address in self._status.rpc], model=MODEL, silence_s=1.0) as rpc,
            asyncio.TaskGroup() as group,
        ):
            for index in range(HTTP_ASKERS):
                group.create_task(self._ask("http", index, self._over_http))
            for index in range(RPC_ASKERS):
                group.create_task(self._ask("rpc", index, lambda case: self._over_rpc(rpc, case)))

    async def _ask(self, door: str, index: int, over: Callable[[Case], Any]) -> None:
        chance = random.Random(f"{door} {index}")
        while time.monotonic() < self._until:
            case = draw(chance, f"{door} {index}")
            self.counts["asked"] += 1
            try:
                found = await over(case)
            except Exception as error:  # the edge of a request: whatever it was, its client saw it
                self.wrong.append(f"{door} {case.prompt[-30:]!r}: {type(error).__name__}: {error}")
                continue
            if found is None:
                self.counts["left"] += 1
            elif found == case.expected():
                self.counts["exact"] += 1
            else:
                self.wrong.append(f"{door} {case.prompt[-30:]!r}: not what it should be")

    async def _over_http(self, case: Case) -> list[str] | None:
        """Answered, left, or cut by its router's death (or refused while that one ends) and then asked again."""
        while True:
            try:
                async with httpx.AsyncClient(base_url=self._status.url, trust_env=False, timeout=60) as http:
                    found = await (self._stream(http, case) if case.stream else self._whole(http, case))
            except httpx.TransportError:
                found = []
            if found != []:
                return found
            self.counts["cut and asked again"] += 1
            await asyncio.sleep(0.05)

    async def _whole(self, http: httpx.AsyncClient, case: Case) -> list[str]:
        answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": case.prompt, **case.body})
        if answer.status_code == 503:
            return []
        answer.raise_for_status()
        return [choice["text"] for choice in answer.json()["choices"]]

    async def _stream(self, http: httpx.AsyncClient, case: Case) -> list[str] | None:
        texts, done = [""] * case.n, False
        body = {"model": MODEL, "prompt": case.prompt, "stream": True, **case.body}
        last = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 503:
                return []
            assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
            async for line in answer.aiter_lines():
                done |= line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    assert chunk["error"]["code"] == "unavailable", chunk
                    return []
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
                now = time.monotonic()
                self.gaps.append(now - last)
                last = now
                if case.leave_after and len(texts[0]) >= case.leave_after:
                    return None
        assert done, "it ended without [DONE]"
        return texts

    async def _over_rpc(self, client: AsyncClient, case: Case) -> list[str] | None:
        call = client.complete(case.prompt, **case.body)
        tokens: list[list[int]] = [[] for _ in range(case.n)]
        last = time.monotonic()
        try:
            async for piece in call.stream():
                assert piece.first == len(tokens[piece.choice]), "a gap or a repeat"
                tokens[piece.choice] += piece.tokens
                now = time.monotonic()
                self.gaps.append(now - last)
                last = now
                if case.leave_after and len(tokens[0]) >= case.leave_after:
                    call.cancel()
        except Cancelled:
            return None
        return [bytes(ids).decode() for ids in tokens]


# --- faults


def _rank(control: ControlClient, replica: str, rank: int, number: signal.Signals) -> None:
    rows = {row.name: row for model in control.status().models for row in model.replicas}
    os.kill(next(pid for number_, _, pid in rows[replica].pids if number_ == rank), number)


def _mpiexec(control: ControlClient, replica: str) -> None:
    rows = {row.name: row for model in control.status().models for row in model.replicas}
    parents = psutil.Process(rows[replica].pids[0][2]).parents()
    launcher = next(process for process in parents if "mpiexec" in process.name())
    os.kill(launcher.pid, signal.SIGKILL)


def _router(control: ControlClient, router: str, number: signal.Signals) -> None:
    os.kill(control.status().routers[router], number)


FAULTS: dict[str, Callable[[ControlClient, str, str], None]] = {
    "a rank is killed": lambda control, replica, _: _rank(control, replica, 1, signal.SIGKILL),
    "a leader is killed": lambda control, replica, _: _rank(control, replica, 0, signal.SIGKILL),
    "a rank is stopped": lambda control, replica, _: _rank(control, replica, 1, signal.SIGSTOP),
    "a leader is stopped": lambda control, replica, _: _rank(control, replica, 0, signal.SIGSTOP),
    "mpiexec is killed": lambda control, replica, _: _mpiexec(control, replica),
    "a replica is drained": lambda control, replica, _: control.drain(replica),
    "a router is killed": lambda control, _, router: _router(control, router, signal.SIGKILL),
    "a router is ordered to stop": lambda control, _, router: _router(control, router, signal.SIGTERM),
}


def disturb(
    control: ControlClient, until: float, chance: random.Random, looks: Callable[[DeploymentStatus], None]
) -> tuple[Counter[str], list[float]]:
    """Faults until ``until``, each when all is well. Returns how often each came, and how long all took to be well again."""
    came, recoveries = Counter[str](), []
    deck: list[str] = []
    while time.monotonic() + EVERY_S < until:
        time.sleep(EVERY_S)
        before = wait_for_state(control, "READY", RECOVERY_S)
        deck = deck or chance.sample(sorted(FAULTS), len(FAULTS))
        name = deck.pop()
        FAULTS[name](control, chance.choice(("left", "right")), chance.choice(("router0", "router1")))
        begun = time.monotonic()
        changed(control, before)
        wait_for_state(control, "READY", RECOVERY_S)
        came[name] += 1
        recoveries.append(time.monotonic() - begun)
        say(f"{name}: all is well after {recoveries[-1]:.1f} s")
        looks(control.status())
    return came, recoveries


def changed(control: ControlClient, before: DeploymentStatus) -> None:
    """Wait until the fault has been answered: another epoch or another router."""

    def lives(status: DeploymentStatus) -> tuple[Any, ...]:
        return tuple((row.name, row.epoch) for model in status.models for row in model.replicas), status.routers

    deadline = time.monotonic() + RECOVERY_S
    while lives(control.status()) == lives(before):
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.05)


# --- what is left


def settle(status: DeploymentStatus) -> int:
    """Sequences and blocks that are still held when all clients are gone, in the end."""
    left = -1
    for _ in range(100):
        found = httpx.get(f"{status.url}/status", trust_env=False).json()
        left = found["running"] + sum(row["running"] + row["waiting"] + row["num_blocks"] - row["free_blocks"] for row in found["replicas"])
        if not left:
            break
        time.sleep(0.1)
    return int(left)


def main() -> int:
    seconds, seed = float(os.environ.get("SOAK_SECONDS", "600")), int(os.environ.get("SOAK_SEED", "1"))
    report = Report()
    growth, traces = Growth(), Traces()
    deployment: dict[str, object] = {
        "name": "soak", "routers": 2, "http": {"host": "127.0.0.1", "port": free_ports(1)}, "hang_floor_s": 2.0, "drain_grace_s": 5.0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as name:
        folder = Path(name)
        with deployed(write_config(folder, deployment=deployment, max_batch_size=32), name="soak") as (control, status):
            until = time.monotonic() + seconds
            load = Load(status, until)

            def look(status: DeploymentStatus) -> None:
                growth.look(status)
                traces.look(status)

            async def both() -> tuple[Counter[str], list[float]]:
                running = asyncio.create_task(load.run())
                found = await asyncio.to_thread(disturb, control, until, random.Random(seed), look)
                await running
                return found

            look(status)
            came, recoveries = asyncio.run(both())
            last = wait_for_state(control, "READY", RECOVERY_S)
            look(last)
            left = settle(last)
        remains = traces.left(folder)
    say(f"{sum(came.values())} faults: " + ", ".join(f"{what} {count}" for what, count in sorted(came.items())))
    say("requests: " + ", ".join(f"{what} {count}" for what, count in sorted(load.counts.items())))
    for line in [*load.wrong[:10], *remains[:10]]:
        say(line)
    report.at_most("requests lost or wrong", len(load.wrong), 0)
    report.at_most("sequences and blocks held at the end", left, 0)
    report.at_most("processes, shared memory segments and sockets left behind", len(remains), 0)
    report.at_most("longest pause of a stream", max(load.gaps, default=0.0), LONGEST_GAP_S, "s", slack=3.0)
    report.at_most("recovery, median", percentile(recoveries, 0.5), 10.0, "s", slack=3.0)
    growth.tell(report)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
