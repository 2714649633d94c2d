"""A real router process between real clients and real gangs on FakeEngine: ipc and CURVE tcp, and what dies in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.client import AsyncClient, Client
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.errors import Cancelled, DeadlineExceeded, NotFound, Rejected, Unavailable
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeOptions

SLOW = msgspec.structs.replace(FAKE, options=FakeOptions(fake_step_ms=10.0))


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def ready(client: Client, count: int) -> None:
    wait_for(lambda: sum(row["state"] == "ready" for row in client.status()["replicas"]) == count, what=f"{count} replicas")


def oracle(prompt: list[int], seed: int, count: int, temperature: float) -> list[int]:
    return expected_tokens(prompt, SamplingParams(seed=seed, max_tokens=count, temperature=temperature))


def test_64_requests_survive_a_killed_replica(folder: Path) -> None:
    """Each once, whole, and equal to the oracle, streamed and not, greedy and seeded, n = 1 and 2, while one of two gangs is killed."""
    with (
        RouterRun(folder) as router,
        Gang(folder, [router.spec.back], name="a", tp=1, engine=SLOW) as victim,
        Gang(folder, [router.spec.back], name="b", tp=1, engine=SLOW) as other,
    ):
        router.wait_serving()
        with Client([router.spec.rpc], model="m") as client:
            ready(client, 2)
            asked = []
            for index in range(64):
                prompt, seed, count, n = [index + 1, 7, 300 - index], 1000 * index, 20 + index % 30, 1 + (index % 8 == 0)
                temperature = float(index % 2)
                call = client.complete(
                    prompt, texts=index % 3 == 0, max_tokens=count, seed=seed, temperature=temperature, n=n, ignore_eos=True
                )
                asked.append((call, prompt, seed, count, n, temperature))
            first = next(asked[0][0].stream())
            assert first.first == 0
            assert victim.wait_phase("ready").phase == "ready"
            os.kill(victim.mpiexec.pid, signal.SIGKILL)
            for call, prompt, seed, count, n, temperature in asked:
                reply = call.result()
                assert reply.seed == seed and reply.attempts == 0
                for choice in range(n):
                    assert reply.choices[choice].tokens == oracle(prompt, seed + choice, count, temperature)
                    assert reply.choices[choice].usage.output_tokens == count
            status = client.status()
            assert status["counts"]["resubmitted"] > 0, "the kill hit nothing"
            assert status["counts"]["finished"] == sum(n for *_, n, _ in asked)
            assert status["counts"]["failed"] == 0 and status["running"] == 0
            assert {row["name"]: row["state"] for row in status["replicas"]} == {"a": "lost", "b": "ready"}
        assert other.state.phase == "ready"
        assert router.terminate() == 0


def test_a_client_goes_on_at_another_router(folder: Path) -> None:
    """SIGKILL of the router in mid-stream: no gap, no repeat, text and ids equal to an undisturbed run."""
    with RouterRun(folder, "r0") as one, RouterRun(folder, "r1") as two:
        one.wait_serving()
        two.wait_serving()
        with Gang(folder, [one.spec.back, two.spec.back], name="a", tp=1, engine=SLOW):
            with Client([two.spec.rpc], model="m") as client:
                ready(client, 1)
                undisturbed = client.complete("the oracle", max_tokens=60, seed=5, n=2, ignore_eos=True).result()
            with Client([one.spec.rpc, two.spec.rpc], model="m", silence_s=1.0) as client:
                call = client.complete("the oracle", max_tokens=60, seed=5, n=2, ignore_eos=True)
                text, positions = "", {0: 0, 1: 0}
                for piece in call.stream():
                    assert piece.first == positions[piece.choice]
                    positions[piece.choice] += len(piece.tokens)
                    if piece.choice == 0:
                        text += piece.text
                    if positions[0] == 10 and one.process.poll() is None:
                        one.kill()
                reply = call.result()
        assert reply.attempts >= 1
        assert text == undisturbed.text
        assert [choice.tokens for choice in reply.choices] == [choice.tokens for choice in undisturbed.choices]


def test_a_hung_router_is_left_too(folder: Path) -> None:
    with RouterRun(folder, "r0") as one, RouterRun(folder, "r1") as two:
        one.wait_serving()
        two.wait_serving()
        with (
            Gang(folder, [one.spec.back, two.spec.back], name="a", tp=1, engine=SLOW),
            Client([one.spec.rpc, two.spec.rpc], model="m", silence_s=1.0) as client,
        ):
            ready(client, 1)
            call = client.complete([1, 2, 3], texts=False, max_tokens=40, seed=1, ignore_eos=True)
            next(call.stream())
            os.kill(one.process.pid, signal.SIGSTOP)
            assert call.result().tokens == oracle([1, 2, 3], 1, 40, 1.0)


def test_one_router_many_habits(folder: Path) -> None:
    """Cancel, deadline, repeated ids, refusals, a stop string, the async client, drain: one world for all."""
    with RouterRun(folder, http=True) as router, Gang(folder, [router.spec.back], name="a", tp=1, engine=SLOW):
        router.wait_serving()
        with Client([router.spec.rpc], model="m") as client:
            ready(client, 1)
            _cancel_and_deadline(client)
            _repeats(client, router)
            _refusals(client)
            whole = client.complete("tell", max_tokens=30, seed=3, ignore_eos=True).result()
            stop = whole.text[5:7]
            stopped = client.complete("tell", max_tokens=30, seed=3, ignore_eos=True, stop=stop).result()
            assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.choices[0].finish_reason == "stop"
            assert "trireme_" in client.metrics() and client.models()[0]["id"] == "m"
            wait_for(lambda: client.status()["running"] == 0, what="an idle router")
        asyncio.run(_asynchronous(router.spec.rpc))
        assert router.terminate() == 0
        state = router.state
        assert state is not None and state.phase == "stopped"
        with Client([router.spec.rpc], model="m", silence_s=0.2) as client, pytest.raises(Unavailable):
            client.complete([1], max_tokens=1).result()


def _cancel_and_deadline(client: Client) -> None:
    call = client.complete([1], texts=False, max_tokens=5000, ignore_eos=True)
    next(call.stream())
    call.cancel()
    with pytest.raises(Cancelled) as caught:
        call.result()
    assert caught.value.request == call.request
    wait_for(lambda: client.status()["running"] == 0, what="the cancelled choice's end")
    with pytest.raises(DeadlineExceeded):
        client.complete([1], texts=False, max_tokens=5000, ignore_eos=True, deadline_s=0.3).result()


def _repeats(client: Client, router: RouterRun) -> None:
    """The same id, live and ended, from the same client and another one: one generation, the same answer."""
    before = client.status()["counts"]["accepted"]
    call = client.complete([4, 5], request="mine", max_tokens=40, seed=9, ignore_eos=True)
    next(call.stream())
    with Client([router.spec.rpc], model="m") as other:
        attached = other.complete([4, 5], request="mine", max_tokens=40, seed=9, ignore_eos=True).result()
        again = other.complete([4, 5], request="mine", max_tokens=40, seed=9, ignore_eos=True).result()
    assert attached.tokens == again.tokens == oracle([4, 5], 9, 40, 1.0)
    assert attached.text == again.text and len(attached.text) > 0
    assert client.status()["counts"]["accepted"] == before + 1
    call.cancel()


def _refusals(client: Client) -> None:
    for options, kind in (
        ({"max_tokens": -1}, Rejected), ({"temperature": "hot"}, Rejected), ({"n": 9}, Rejected), ({"model": "ghost"}, NotFound)
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            client.complete([1, 2], **options).result()
        assert caught.value.request
    with pytest.raises(Rejected):
        client.complete([1, 2], request="x" * 200).result()


async def _asynchronous(endpoint: str) -> None:
    async with AsyncClient([endpoint], model="m") as client:
        calls = [client.complete([index, 1], texts=False, max_tokens=10, seed=index, ignore_eos=True) for index in range(16)]
        replies = await asyncio.gather(*(call.result() for call in calls))
        assert [reply.tokens for reply in replies] == [oracle([index, 1], index, 10, 1.0) for index in range(16)]
        pieces = [piece async for piece in client.chat([{"role": "user", "content": "hi"}], max_tokens=8).stream()]
        assert pieces[-1].finish_reason and "".join(piece.text for piece in pieces)
        assert (await client.models())[0]["id"] == "m"
        call = client.complete([1], max_tokens=5000, ignore_eos=True)
        async for _ in call.stream():
            call.cancel()
            break
        with pytest.raises(Cancelled):
            await call.result()
