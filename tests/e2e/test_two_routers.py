"""Two routers on one HTTP port: both serve, one is killed, its clients go on at the other, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from pathlib import Path

import httpx

from orchestrator.client import AsyncClient, Client
from orchestrator.launch.control import Status
from tests.e2e.deployment import MODEL, deployed, wait_for_state, write_config
from tests.gang import wait_for
from workers.fake import expected_tokens
from workers.wire import SamplingParams

OUTPUT = 100
REQUESTS = 24


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def oracle(prompt: str) -> str:
    return bytes(expected_tokens(prompt.encode(), SamplingParams(max_tokens=OUTPUT, temperature=0.0))).decode()


async def routers_seen(url: str) -> set[str]:
    """Who answers on the port: the kernel deals each new connection to one of the listeners."""
    seen: set[str] = set()
    for _ in range(200):
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            seen.add((await http.get("/status")).json()["router"])
        if len(seen) == 2:
            break
    return seen


async def ask_http(url: str, prompt: str, cut: list[str]) -> str:
    """As an HTTP client does: one whose connection is reset asks again."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}
    while True:
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
                answer = await http.post("/v1/completions", json=body)
        except httpx.TransportError:
            cut.append(prompt)
            continue
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])


async def ask_rpc(client: AsyncClient, prompt: str, begun: asyncio.Event) -> tuple[str, int]:
    call = client.complete(prompt, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    text, count = "", 0
    async for piece in call.stream():
        assert piece.first == count
        count += len(piece.tokens)
        text += piece.text
        if count >= 10:
            begun.set()
    return text, (await call.result()).attempts


async def kill_one(status: Status) -> None:
    """SIGKILL the first router in the middle of everybody's answers."""
    begun, cut = asyncio.Event(), []
    async with (
        AsyncClient([address.endpoint for address in status.rpc], model=MODEL, silence_s=1.0) as client,
        asyncio.TaskGroup() as group,
    ):
        https = [group.create_task(ask_http(status.url, f"http {index}", cut)) for index in range(REQUESTS)]
        rpcs = [group.create_task(ask_rpc(client, f"rpc {index}", begun)) for index in range(REQUESTS)]
        await asyncio.wait_for(begun.wait(), 60)
        os.kill(status.routers["router0"], signal.SIGKILL)
    assert [task.result() for task in https] == [oracle(f"http {index}") for index in range(REQUESTS)]
    assert len(cut) > 0, "the kernel deals connections to both: some were the dead one's"
    assert [task.result()[0] for task in rpcs] == [oracle(f"rpc {index}") for index in range(REQUESTS)]
    assert all(task.result()[1] > 0 for task in rpcs), "all RPC clients were at the dead one"


def test_a_killed_routers_clients_go_on_at_the_other() -> None:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        shared = {"routers": 2, "http": {"host": "127.0.0.1", "port": free_port()}}
        with deployed(write_config(Path(folder), deployment=shared, max_batch_size=32)) as (control, status):
            assert asyncio.run(routers_seen(status.url)) == {"router0", "router1"}
            asyncio.run(kill_one(status))
            wait_for(lambda: control.status().routers.get("router0", 0) not in (0, status.routers["router0"]), 30, "the new router")
            again = wait_for_state(control, "READY", 60)
            assert again.routers["router1"] == status.routers["router1"], "the other one was touched"
            with Client([again.rpc[0].endpoint], model=MODEL) as client:
                wait_for(lambda: [row["state"] for row in client.status()["replicas"]] == ["ready"] * 2, 30, "the replicas' Hello")
                reply = client.complete("again", max_tokens=OUTPUT, temperature=0.0, ignore_eos=True).result()
                assert reply.text == oracle("again")
            assert asyncio.run(routers_seen(status.url)) == {"router0", "router1"}
