"""Turns at a pool: in the order of the callers, not of their jobs; no turn is lost, whoever is cancelled when."""

from __future__ import annotations

import asyncio
import random

import pytest

from orchestrator.router.frontend.fair_turns import FairTurns


def test_one_job_of_a_caller_waits_for_no_more_than_one_of_each_other() -> None:
    order: list[str] = []

    async def job(turns: FairTurns, caller: str) -> None:
        async with turns.turn(caller):
            order.append(caller)
            await asyncio.sleep(0)

    async def run() -> None:
        turns = FairTurns(1)
        jobs = [asyncio.create_task(job(turns, "many")) for _ in range(50)]
        await asyncio.sleep(0)
        jobs += [asyncio.create_task(job(turns, name)) for name in ("one", "two")]
        await asyncio.gather(*jobs)

    asyncio.run(run())
    assert max(order.index("one"), order.index("two")) <= 5 and len(order) == 52


@pytest.mark.parametrize("seed", range(20))
def test_no_turn_is_lost_and_none_is_given_twice(seed: int) -> None:
    chance = random.Random(seed)
    running = most = 0

    async def job(turns: FairTurns, caller: str) -> None:
        nonlocal running, most
        async with turns.turn(caller):
            running += 1
            most = max(most, running)
            try:
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                running -= 1

    async def run() -> None:
        turns = FairTurns(2)
        jobs = []
        for _ in range(60):
            jobs.append(asyncio.create_task(job(turns, chance.choice("abc"))))
            if chance.random() < 0.4:
                chance.choice(jobs).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.gather(*jobs, return_exceptions=True)
        async with asyncio.timeout(5), turns.turn("x"), turns.turn("y"):
            pass  # both are free again

    asyncio.run(run())
    assert most == 2 and running == 0
