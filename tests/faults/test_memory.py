"""F22: more sequences than the K/V pool can hold are preempted and computed again, exactly; what can never fit is refused before admission.

One rank of the portable engine in fixed shapes, so that a sequence alone and a sequence that was preempted among others have the same bits.
"""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from orchestrator.client import AsyncClient, Client
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from tests.support.tiny_models import tiny_model
from workers.protocol.specs import PortableSpec

pytestmark = pytest.mark.mpi
POOL, OUTPUT, SEQUENCES = 256, 90, 6
ENGINE = PortableSpec(fixed_shape=True, kv_tokens=POOL, max_seq_len=POOL, max_batch_size=16, max_num_tokens=64, prefix_cache=False)


async def ask(client: AsyncClient, index: int) -> tuple[list[int], int]:
    """(tokens, preemptions) of one sequence."""
    call = client.complete(
        f"row {index:2} of many.", max_tokens=OUTPUT, temperature=index % 2 * 0.8, seed=index, ignore_eos=True, texts=False
    )
    (choice,) = (await call.result()).choices
    return choice.tokens, choice.usage.preemptions


def test_an_exhausted_pool_costs_time_and_no_token() -> None:
    with (
        short_folder() as folder,
        RouterRun(folder, http=True) as router,
        Gang(folder, [router.spec.back], tp=1, engine=ENGINE, artifact=str(tiny_model(folder / "tiny"))),
        Client([router.spec.rpc], model="m") as watch,
    ):
        url = router.wait_serving().http
        wait_for(lambda: [row["state"] for row in watch.status()["replicas"]] == ["ready"], 60)

        async def scene() -> tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]:
            async with AsyncClient([router.spec.rpc], model="m") as client:
                together = await asyncio.gather(*(ask(client, index) for index in range(SEQUENCES)))
                alone = [await ask(client, index) for index in range(SEQUENCES)]
            return list(together), alone

        together, alone = asyncio.run(asyncio.wait_for(scene(), 240))
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
        assert sum(preempted for _, preempted in together) > 0, "the pool was never short: the test proved nothing"
        assert not any(preempted for _, preempted in alone)

        for prompt, output in ((300, 10), (200, 100)):
            body = {"model": "m", "prompt": [7] * prompt, "max_tokens": output}
            begin = time.monotonic()
            answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=30)
            figure("F22 a request beyond the pool -> refused", time.monotonic() - begin, 1.0)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded"), answer.text
            assert str(POOL) in answer.json()["error"]["message"]
        wait_for(lambda: (row := watch.status()["replicas"][0])["free_blocks"] == row["num_blocks"])
