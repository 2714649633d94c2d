"""CPU time of the router per token: CPU seconds of its process, with FakeEngine behind it and 128 client streams.

    python -m bench.router [--runs 5] [--streams 128]

Each run reads answers of 200 tokens: their cost, including admission (validation, template, tokenizing, placing), is the figure. It then
reads answers of twice that length: the difference is the cost of tokens alone. CPU seconds and not wall time are measured, because the
client, the replica and other processes share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from bench.report import Claim, publish, say
from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import DeploymentStatus
from tests.support.deployment import MODEL, deployed, write_config

BODY = {"temperature": 0.0, "ignore_eos": True}


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its threads, in nanosecond steps: /proc/PID/stat counts in ticks of 10 ms, a step of 0.4 us a token."""
    process_cpu_clock = (~pid << 3) | 2  # the clock id that clock_getcpuclockid(3) computes from a pid on Linux
    return time.clock_gettime(process_cpu_clock)


async def http_streams(status: DeploymentStatus, streams: int, tokens: int) -> int:
    """Read ``streams`` SSE answers at once; returns the tokens that arrived."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=status.url, timeout=300, limits=limits, trust_env=False) as client:

        async def one(index: int) -> int:
            body = {"model": MODEL, "prompt": f"request {index:04d}", "max_tokens": tokens, "stream": True, **BODY}
            chunks = 0
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for piece in answer.aiter_raw():
                    chunks += piece.count(b'"text":')
            return chunks

        return sum(await asyncio.gather(*(one(index) for index in range(streams))))


async def rpc_streams(status: DeploymentStatus, streams: int, tokens: int) -> int:
    """Read ``streams`` answers over one RPC client, ids only; returns the tokens that arrived."""
    async with AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as client:

        async def one(index: int) -> int:
            call = client.complete([65 + index % 26] * 12, texts=False, max_tokens=tokens, **BODY)
            return sum([len(piece.tokens) async for piece in call.stream()])

        return sum(await asyncio.gather(*(one(index) for index in range(streams))))


def spent_by(pid: int, api: str, status: DeploymentStatus, streams: int, tokens: int) -> float:
    """CPU seconds of process ``pid`` while ``streams`` answers of ``tokens`` tokens are read."""
    before = cpu_seconds(pid)
    arrived = asyncio.run(APIS[api](status, streams, tokens))
    if arrived < streams * tokens:
        raise SystemExit(f"{api}: {arrived} tokens arrived of {streams * tokens}")
    return cpu_seconds(pid) - before


APIS = {"HTTP": http_streams, "RPC": rpc_streams}
ASKED = {"HTTP": 50.0, "RPC": 10.0}
TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=128)
    args = parser.parse_args()
    whole: dict[str, list[float]] = {api: [] for api in APIS}
    alone: dict[str, list[float]] = {api: [] for api in APIS}
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        replicas = [{"name": "only", "tp_size": 1}]
        file = write_config(Path(folder), replicas=replicas, max_batch_size=args.streams, max_num_tokens=2048, kv_tokens=131072)
        with deployed(file) as (_, status):
            pid = next(iter(status.routers.values()))
            for _ in range(args.runs):
                for api in APIS:
                    once, twice = (spent_by(pid, api, status, args.streams, TOKENS * times) for times in (1, 2))
                    whole[api].append(once / (args.streams * TOKENS) * 1e6)
                    alone[api].append((twice - once) / (args.streams * TOKENS) * 1e6)
                    say(f"bench.router: {api} {whole[api][-1]:.1f} us a token, {alone[api][-1]:.1f} without admission")
    publish([claim(api, args.streams, whole[api], alone[api]) for api in APIS])


def claim(api: str, streams: int, whole: list[float], alone: list[float]) -> Claim:
    detail = f"{streams} streams, requests of {TOKENS} tokens, admission included; a token alone {median(alone):.1f} us"
    return Claim(name=f"router, {api}", unit="us/token", asked=ASKED[api], sense="<=", runs=whole, detail=detail)


if __name__ == "__main__":
    main()
