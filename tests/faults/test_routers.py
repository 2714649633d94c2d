"""F07, F09, F26: what a router leaves behind when it is killed or ordered to end, and what it does alone. Tokens are the oracle's.

The deployment's view of it (one HTTP port, a new process in the dead one's place) is tests/e2e/test_two_routers.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from orchestrator.client import AsyncClient, Client
from orchestrator.config.router_spec import AdmissionSpec
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeOptions, FakeSpec

pytestmark = pytest.mark.mpi
ENGINE = FakeSpec(max_batch_size=64, options=FakeOptions(fake_step_ms=10.0))
OUTPUT, EACH = 300, 8
ENDLESS = 20_000


def oracle(prompt: str, count: int) -> list[int]:
    return expected_tokens(prompt.encode(), SamplingParams(max_tokens=count, temperature=0.0))


@contextmanager
def two_routers() -> Iterator[tuple[Path, RouterRun, RouterRun, Gang]]:
    with (
        short_folder() as folder,
        RouterRun(folder, "a", http=True) as a,
        RouterRun(folder, "b", http=True) as b,
        Gang(folder, [a.spec.back, b.spec.back], engine=ENGINE) as gang,
    ):
        for router in (a, b):
            router.wait_serving()
            with Client([router.spec.rpc], model="m") as client:
                until(lambda client=client: [row["state"] for row in client.status()["replicas"]] == ["ready"])  # type: ignore[misc]
        yield folder, a, b, gang


def until(condition: Callable[[], object], bound_s: float = 120.0) -> float:
    """Seconds until it held."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < bound_s, f"not within {bound_s} s"
        time.sleep(0.02)
    return time.monotonic() - begin


async def rpc(client: AsyncClient, prompt: str, begun: asyncio.Event) -> int:
    """Attempts of an exact answer."""
    call = client.complete(prompt, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    tokens: list[int] = []
    async for piece in call.stream():
        assert piece.first == len(tokens)
        tokens += piece.tokens
        begun.set()
    assert tokens == oracle(prompt, OUTPUT), prompt
    return (await call.result()).attempts


async def http(url: str, prompt: str, count: int, begun: asyncio.Event) -> tuple[str, bool, list[str]]:
    """(text, whether it ended by a reset, codes of error events)."""
    body = {"model": "m", "prompt": prompt, "max_tokens": count, "temperature": 0.0, "ignore_eos": True, "stream": True}
    text, errors = "", []
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    errors.append(chunk["error"]["code"])
                    continue
                text += "".join(choice["text"] for choice in chunk["choices"])
                begun.set()
    except httpx.TransportError:
        return text, True, errors
    return text, False, errors


def test_without_a_replica_requests_wait_their_time_and_no_longer() -> None:
    """F26: 503 with Retry-After when the queue's time is over. The same router serves once a replica is there."""
    admission = AdmissionSpec(queue_timeout_s=2.0)
    with short_folder() as folder, RouterRun(folder, http=True, admission=admission, replica_timeout_s=1.0) as router:
        url = router.wait_serving().http
        body = {"model": "m", "prompt": "wait", "max_tokens": 5, "temperature": 0.0, "ignore_eos": True}

        def ask() -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=60)

        def refused() -> None:
            begin = time.monotonic()
            answer = ask()
            figure("F26 no replica: a request waits 2 s -> 503", time.monotonic() - begin, 2.5)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text

        refused()
        for epoch in (1, 2):
            with Gang(folder, [router.spec.back], name=f"r{epoch}", tp=1, engine=ENGINE, epoch=epoch) as gang:
                gang.wait_phase("ready")
                until(lambda: httpx.get(f"{url}/ready", trust_env=False, timeout=60).status_code == 200)
                answer = ask()
                assert answer.json()["choices"][0]["text"] == bytes(oracle("wait", 5)).decode(), answer.text
            refused()


def test_a_killed_routers_requests_move_or_are_cancelled() -> None:
    with two_routers() as (folder, a, b, gang):
        url_a, url_b = a.wait_serving().http, b.wait_serving().http

        async def scene(watch: Client) -> None:
            begun = [asyncio.Event() for _ in range(3 * EACH)]
            async with (
                AsyncClient([a.spec.rpc, b.spec.rpc], model="m", silence_s=1.0) as movers,
                AsyncClient([b.spec.rpc], model="m") as others,
                asyncio.TaskGroup() as group,
            ):
                lost = [group.create_task(http(url_a, f"left {i}", ENDLESS, begun[i])) for i in range(EACH)]
                moved = [group.create_task(rpc(movers, f"moved {i}", begun[EACH + i])) for i in range(EACH)]
                kept = [group.create_task(rpc(others, f"kept {i}", begun[2 * EACH + i])) for i in range(EACH)]
                await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
                a.kill()
                killed = time.monotonic()

                def sequences() -> int:
                    return int(watch.status()["replicas"][0]["running"])

                await asyncio.to_thread(until, lambda: sequences() <= 2 * EACH, 10.0)
                figure("F09 router killed -> its abandoned sequences cancelled", time.monotonic() - killed, 2.0)
            for i, task in enumerate(lost):
                text, reset, errors = task.result()
                assert reset and not errors and text == bytes(oracle(f"left {i}", len(text))).decode()
            assert all(task.result() > 0 for task in moved) and all(task.result() == 0 for task in kept)

        with Client([b.spec.rpc], model="m") as watch:
            asyncio.run(scene(watch))
            until(lambda: (row := watch.status()["replicas"][0])["running"] == 0 and row["free_blocks"] == row["num_blocks"])
        retried = asyncio.run(http(url_b, "again", OUTPUT, asyncio.Event()))
        assert retried == (bytes(oracle("again", OUTPUT)).decode(), False, []), "a retry is served by the other"

        # A new process at the same addresses is found by the replica, which loads nothing again.
        pids = gang.state.pids
        with RouterRun(folder, "a", http=True) as again, Client([again.spec.rpc], model="m") as client:
            again.wait_serving()
            figure("F07 router serves again -> replica registered", until(lambda: client.status()["replicas"]), 3.0)
            assert client.complete("back", max_tokens=9, temperature=0.0, ignore_eos=True).result().tokens == oracle("back", 9)
        assert gang.state.pids == pids


def refused(url: str) -> bool:
    """Whether nobody listens there any more."""
    try:
        httpx.get(f"{url}/health", trust_env=False)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass  # accepted, and closed before an answer
    return False


@pytest.mark.parametrize("hurried", [False, True], ids=["grace", "second signal"])
def test_a_router_told_to_end_finishes_or_says_one_last_word(hurried: bool) -> None:
    with two_routers() as (_, a, b, _gang):
        url, count = a.wait_serving().http, ENDLESS if hurried else OUTPUT
        begun = asyncio.Event()
        found: list[tuple[str, bool, list[str]]] = []

        async def scene() -> None:
            found.append(await http(url, "last", count, begun))

        asking = threading.Thread(target=lambda: asyncio.run(scene()))
        asking.start()
        until(begun.is_set)
        os.kill(a.process.pid, signal.SIGTERM)
        if hurried:
            until(lambda: (state := a.state) and state.phase == "draining")
            until(lambda: refused(url))  # the listener closes within a tick of its server
            os.kill(a.process.pid, signal.SIGTERM)
        begin = time.monotonic()
        assert a.process.wait(30) == 0
        figure(f"F09 router ordered to end{' twice' if hurried else ''} -> gone", time.monotonic() - begin, 1.0 if hurried else 5.0)
        asking.join(10)
        ((text, reset, errors),) = found
        assert not reset and text == bytes(oracle("last", len(text))).decode()
        assert (errors == ["unavailable"]) if hurried else (len(text) == OUTPUT and not errors)
        with Client([b.spec.rpc], model="m") as watch:
            until(lambda: watch.status()["replicas"][0]["running"] == 0)
