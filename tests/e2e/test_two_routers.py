"""deploy/examples/ha.yaml as it stands, but for ports, launcher and engine: either router is killed under load and nobody is lost.

RPC goes over tcp with CURVE.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from orchestrator.client import AsyncClient, Client, ClientKeys
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
from tests.support.deployment import deployed, wait_for_state
from tests.support.figures import figure
from tests.support.gang import wait_for
from tests.support.ports import free_ports
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

HA = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "ha.yaml"
MODEL = "smollm2-135m-instruct"
OUTPUT = 100
REQUESTS = 24
#: Bounds of the promise, seconds.
REGISTERED_S, CANCELLED_S = 3.0, 2.0


def prompt(kind: int, index: int) -> list[int]:
    return [1000 + kind, 2000 + index, 30, 40, 50]


def oracle(ids: list[int]) -> list[int]:
    return expected_tokens(ids, SamplingParams(max_tokens=OUTPUT, temperature=0.0))


def keys_of(status: DeploymentStatus) -> ClientKeys:
    return msgspec.json.decode(Path(status.key_file).read_bytes(), type=ClientKeys)


async def routers_seen(url: str) -> set[str]:
    """Who answers on the port: the kernel deals each new connection to one of the listeners."""
    seen: set[str] = set()
    for _ in range(200):
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            seen.add((await http.get("/status")).json()["router"])
        if len(seen) == 2:
            break
    return seen


async def ask_http(url: str, ids: list[int], cut: list[list[int]]) -> str:
    """As an HTTP client does: one whose connection is reset asks again."""
    body = {"model": MODEL, "prompt": ids, "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}
    while True:
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
                answer = await http.post("/v1/completions", json=body)
        except httpx.TransportError:
            cut.append(ids)
            continue
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])


async def ask_rpc(client: AsyncClient, ids: list[int], begun: asyncio.Event) -> tuple[list[int], int]:
    call = client.complete(ids, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, texts=False)
    tokens: list[int] = []
    async for piece in call.stream():
        assert piece.first == len(tokens), "a gap or a repeat"
        tokens += piece.tokens
        if len(tokens) >= 10:
            begun.set()
    return tokens, (await call.result()).attempts


async def kill_one(status: DeploymentStatus) -> None:
    """SIGKILL the first router in the middle of everybody's answers."""
    begun, cut = asyncio.Event(), []
    http_prompts = [prompt(1, index) for index in range(REQUESTS)]
    rpc_prompts = [prompt(2, index) for index in range(REQUESTS)]
    undisturbed = await asyncio.gather(*(ask_http(status.url, ids, cut) for ids in http_prompts))
    assert not cut and len(set(undisturbed)) == REQUESTS
    async with AsyncClient(status.rpc, model=MODEL, keys=keys_of(status), silence_s=1.0) as client, asyncio.TaskGroup() as group:
        https = [group.create_task(ask_http(status.url, ids, cut)) for ids in http_prompts]
        rpcs = [group.create_task(ask_rpc(client, ids, begun)) for ids in rpc_prompts]
        await asyncio.wait_for(begun.wait(), 60)
        os.kill(status.routers["router0"], signal.SIGKILL)
    assert [task.result() for task in https] == undisturbed
    assert len(cut) > 0, "the kernel deals connections to both: some were the dead one's"
    assert [task.result()[0] for task in rpcs] == [oracle(ids) for ids in rpc_prompts]
    assert all(task.result()[1] > 0 for task in rpcs), "all RPC clients were at the dead one"


def states(client: Client) -> list[str]:
    return [row["state"] for row in client.status()["replicas"]]


def register_again(control: ControlClient, before: DeploymentStatus) -> DeploymentStatus:
    """The killed router's successor knows the replicas, which did not restart."""
    wait_for(lambda: control.status().routers.get("router0", 0) not in (0, before.routers["router0"]), 30, "the new router")
    pid = control.status().routers["router0"]
    state = Path(before.run_dir, "routers", "router0.state.json")
    wait_for(lambda: state.exists() and json.loads(state.read_bytes())["pid"] == pid, 30, "the new router's doors")
    served = state.stat().st_mtime
    print(f"F07 router's start -> its doors are open {served - psutil.Process(pid).create_time():.2f} s")
    with Client([before.rpc[0]], model=MODEL, keys=keys_of(before)) as client:
        wait_for(lambda: states(client) == ["ready"] * 2, 30, "the replicas' Hello")
        figure("F07 router's doors open -> replicas registered", time.time() - served, REGISTERED_S)
        reply = client.complete(prompt(3, 0), max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, texts=False).result()
        assert reply.choices[0].tokens == oracle(prompt(3, 0))
    again = wait_for_state(control, "READY", 60)
    assert again.routers["router1"] == before.routers["router1"], "the other one was touched"
    epochs = [{replica.name: replica.epoch for replica in status.models[0].replicas} for status in (before, again)]
    assert epochs[0] == epochs[1], "a replica was launched again"
    return again


async def abandon(status: DeploymentStatus, watcher: Client) -> None:
    """Long answers at the second router alone, which is killed; nobody comes for them. ``watcher``: a client of the first one."""
    client = AsyncClient([status.rpc[1]], model=MODEL, keys=keys_of(status))
    begun = asyncio.Event()

    async def read(index: int) -> None:
        call = client.complete(prompt(4, index), max_tokens=1500, temperature=0.0, ignore_eos=True, texts=False)
        async for _ in call.stream():
            begun.set()

    tasks = [asyncio.create_task(read(index)) for index in range(8)]
    await asyncio.wait_for(begun.wait(), 60)
    await asyncio.to_thread(wait_for, lambda: sequences_left(watcher) == 8, 30, "the sequences in the other router's eyes")
    os.kill(status.routers["router1"], signal.SIGKILL)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    client.close()


def sequences_left(client: Client) -> int:
    return sum(row["running"] + row["waiting"] for row in client.status()["replicas"])


@pytest.mark.model
def test_a_killed_routers_clients_go_on_at_the_other() -> None:
    first = free_ports(5)
    settings = {
        "PORT": str(first), "RPC_PORT": str(first + 1), "METRICS_PORT": str(first + 3), "LAUNCHER": "local", "ENGINE": "fake",
        "FAKE_STEP_MS": "20", "MAX_BATCH_SIZE": "32", "KV_TOKENS": "65536", "MAX_SEQ_LEN": "2048",
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder,
        deployed(HA, name="ha", folder=Path(folder), settings=settings) as (control, status),
    ):
        assert all(address.endpoint.startswith("tcp://") and address.server_key for address in status.rpc)
        assert asyncio.run(routers_seen(status.url)) == {"router0", "router1"}
        asyncio.run(kill_one(status))
        again = register_again(control, status)
        assert asyncio.run(routers_seen(again.url)) == {"router0", "router1"}
        with Client([again.rpc[0]], model=MODEL, keys=keys_of(again)) as watcher:
            wait_for(lambda: sequences_left(watcher) == 0, 30, "rest")
            asyncio.run(abandon(again, watcher))
            killed = time.monotonic()
            wait_for(lambda: sequences_left(watcher) == 0, 30, "the end of a dead router's sequences")
            figure("F09 router's death -> its sequences cancelled", time.monotonic() - killed, CANCELLED_S)
