"""Both doors under 64 concurrent mixed requests, undisturbed and with a rank killed: every request exactly once, to the token."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from workers.engines.fake import expected_tokens
from workers.protocol.errors import Cancelled
from workers.protocol.messages import SamplingParams

REQUESTS = 64
CANCEL_AFTER = 5
#: What one that is cancelled asks for beyond that: half a minute of steps.
LEFT_OUTPUT = 1500


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One request: ``prompt`` ids are printable bytes, so text and ids are the same thing."""

    index: int
    prompt: list[int]
    output: int
    temperature: float
    door: str
    cancelled: bool

    @property
    def text(self) -> str:
        return bytes(self.prompt).decode()

    @property
    def body(self) -> dict[str, object]:
        return {"max_tokens": self.output, "temperature": self.temperature, "seed": 1000 + self.index, "ignore_eos": True}

    def expected(self) -> list[int]:
        params = SamplingParams(max_tokens=self.output, temperature=self.temperature, seed=1000 + self.index, ignore_eos=True)
        return expected_tokens(self.prompt, params)


def cases(seed: int) -> list[Case]:
    """Half over HTTP (streamed and not), half over RPC (with text and ids only); every fourth is cancelled by its client, long before it
    would end by itself."""
    draw = random.Random(seed)
    doors = ("http", "http stream", "rpc", "rpc ids")
    left = (1, 6)
    return [
        Case(
            index=index,
            prompt=[draw.randrange(33, 127) for _ in range(draw.randrange(4, 200))],
            output=draw.randrange(40, 120) + LEFT_OUTPUT * (index % 8 in left),
            temperature=draw.choice((0.0, 0.8)),
            door=doors[index % 4],
            cancelled=index % 8 in left,
        )
        for index in range(REQUESTS)
    ]


async def ask_http(client: httpx.AsyncClient, case: Case) -> list[int] | None:
    """The answer's ids, or None where the client left."""
    body = {"model": MODEL, "prompt": case.text, **case.body}
    if case.door == "http":
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        found = answer.json()
        assert found["usage"]["completion_tokens"] == case.output
        assert found["choices"][0]["finish_reason"] == "length"
        return list(found["choices"][0]["text"].encode())
    text, ends = "", []
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body | options) as answer:
        answer.raise_for_status()
        usage = None
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ends.append("[DONE]")
                continue
            chunk = msgspec.json.decode(line[6:])
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["text"]
                ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            if case.cancelled and len(text) >= CANCEL_AFTER:
                return None
    assert ends == ["length", "[DONE]"]
    assert usage is not None and usage["completion_tokens"] == case.output
    return list(text.encode())


async def ask_rpc(client: AsyncClient, case: Case) -> list[int] | None:
    """The answer's ids, or None where the client cancelled."""
    call = client.complete(case.prompt, texts=case.door == "rpc", **case.body)
    tokens: list[int] = []
    text = ""
    try:
        async for piece in call.stream():
            tokens += piece.tokens
            text += piece.text
            if case.cancelled and len(tokens) >= CANCEL_AFTER:
                call.cancel()
    except Cancelled:
        assert case.cancelled
        return None
    assert case.door == "rpc ids" or text == bytes(tokens).decode()
    return tokens


async def run_all(status: DeploymentStatus, seed: int, disturb: Callable[[], Awaitable[None]] | None = None) -> dict[int, list[int] | None]:
    limits = httpx.Limits(max_connections=REQUESTS)
    async with (
        httpx.AsyncClient(base_url=status.url, timeout=120, limits=limits, trust_env=False) as http,
        AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as rpc,
        asyncio.TaskGroup() as group,
    ):
        tasks = {
            case.index: group.create_task(ask_http(http, case) if case.door.startswith("http") else ask_rpc(rpc, case))
            for case in cases(seed)
        }
        if disturb is not None:
            await disturb()
        await asyncio.wait(tasks.values())
    return {index: task.result() for index, task in tasks.items()}


def check(answers: dict[int, list[int] | None], seed: int) -> None:
    asked = cases(seed)
    assert len(answers) == REQUESTS
    for case in asked:
        if case.cancelled:
            assert answers[case.index] is None, f"request {case.index} was cancelled"
        else:
            assert answers[case.index] == case.expected(), f"request {case.index} over {case.door}"


async def idle(status: DeploymentStatus) -> dict[str, int]:
    """Wait until no replica runs anything: what was cancelled is free. Returns the router's counts."""
    async with httpx.AsyncClient(base_url=status.url, trust_env=False) as http:
        for _ in range(200):
            found = (await http.get("/status")).json()
            if all(row["running"] == 0 and row["waiting"] == 0 for row in found["replicas"]) and not found["running"]:
                return dict(found["counts"])
            await asyncio.sleep(0.05)
    raise AssertionError(f"sequences are left: {found}")


@pytest.fixture(scope="module")
def up() -> Iterator[tuple[ControlClient, DeploymentStatus]]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        pids: set[int] = set()
        with deployed(write_config(Path(folder))) as (control, status):
            yield control, status
            pids = {pid for model in control.status().models for row in model.replicas for _, _, pid in row.pids}
        assert pids and not any(psutil.pid_exists(pid) for pid in pids), "ranks outlive their deployment"


def test_every_request_is_answered_exactly_once(up: tuple[ControlClient, DeploymentStatus]) -> None:
    _, status = up
    answers = asyncio.run(run_all(status, seed=1))
    check(answers, seed=1)
    counts = asyncio.run(idle(status))
    assert counts["resubmitted"] == counts["duplicate_tokens"] == counts["gaps"] == 0


def test_a_killed_rank_is_a_pause_and_not_a_loss(up: tuple[ControlClient, DeploymentStatus]) -> None:
    control, status = up
    before = {row.name: row for model in status.models for row in model.replicas}

    async def kill_a_rank() -> None:
        async with httpx.AsyncClient(base_url=status.url, trust_env=False) as http:
            for _ in range(400):
                found = (await http.get("/status")).json()
                running = {row["name"]: row["running"] for row in found["replicas"]}
                if running.get("left", 0) >= 4:
                    break
                await asyncio.sleep(0.01)
            else:
                raise AssertionError(f"the replica got nothing to do: {found}")
        _, _, pid = next(entry for entry in before["left"].pids if entry[0] == 1)
        os.kill(pid, signal.SIGKILL)

    answers = asyncio.run(run_all(status, seed=2, disturb=kill_a_rank))
    check(answers, seed=2)
    after = {row.name: row for model in wait_for_state(control, "READY", 60).models for row in model.replicas}
    assert after["left"].epoch > before["left"].epoch, "the gang was not replaced"
    assert after["right"].epoch == before["right"].epoch, "the other gang was touched"
    counts = asyncio.run(idle(status))
    assert counts["resubmitted"] >= 4, "the kill hit nobody: the test proved nothing"
    assert counts["gaps"] == 0
