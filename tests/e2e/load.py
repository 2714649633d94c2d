"""Constant load over both doors of a deployment on the fake engine: askers that never rest and know every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx
import msgspec

from orchestrator.client import AsyncClient, ClientKeys
from tests.support.deployment import MODEL
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import RouterAddress

ASKERS = 6
#: Steps of 20 ms: longer than the drain's grace in these tests, so some are handed over in the middle.
OUTPUT = 60

_T = TypeVar("_T")


def expected(prompt: str) -> str:
    return bytes(expected_tokens(prompt.encode(), SamplingParams(max_tokens=OUTPUT, temperature=0.0))).decode()


class Load:
    """Twelve askers. Leaves with the first wrong or failed answer. ``keys``: of the RPC askers, for ``tcp://`` doors."""

    def __init__(self, url: str, rpc: Sequence[RouterAddress], keys: ClientKeys | None = None) -> None:
        self._url, self._rpc, self._keys = url, rpc, keys
        self._stop = False
        self.answered = 0

    async def during(self, work: Callable[[], _T]) -> _T:
        """Keep asking while ``work`` goes on in a thread; returns what it returns, once every asker has its last answer."""
        limits = httpx.Limits(max_connections=2 * ASKERS)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits, trust_env=False) as http,
            AsyncClient(self._rpc, model=MODEL, keys=self._keys) as rpc,
            asyncio.TaskGroup() as group,
        ):
            for index in range(ASKERS):
                group.create_task(self._ask_http(http, index, stream=index % 2 == 0))
                group.create_task(self._ask_rpc(rpc, index))
            try:
                return await asyncio.to_thread(work)
            finally:
                self._stop = True

    async def _ask_http(self, http: httpx.AsyncClient, index: int, *, stream: bool) -> None:
        count = 0
        while not self._stop:
            prompt = f"http {index} {count}"
            body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True, "stream": stream}
            text = ""
            if stream:
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            chunk = msgspec.json.decode(line[6:])
                            assert "error" not in chunk, chunk
                            text += "".join(choice["text"] for choice in chunk["choices"])
            else:
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                text = answer.json()["choices"][0]["text"]
            assert text == expected(prompt)
            self.answered += 1
            count += 1

    async def _ask_rpc(self, rpc: AsyncClient, index: int) -> None:
        count = 0
        while not self._stop:
            prompt = f"rpc {index} {count}"
            reply = await rpc.complete(prompt, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True).result()
            assert reply.choices[0].text == expected(prompt)
            self.answered += 1
            count += 1
