"""What the router costs a token: CPU seconds of its process, with FakeEngine behind it and 128 streams before it.

    python -m bench.router [--runs 5] [--streams 128] [--tokens 200]

CPU seconds, not wall time: the client, the replica and whatever else runs share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import httpx
import psutil

from bench.report import Claim, publish, say
from orchestrator.client import AsyncClient
from orchestrator.launch.control import Status
from tests.e2e.deployment import MODEL, deployed, write_config

BODY = {"temperature": 0.0, "ignore_eos": True}


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def http_streams(status: Status, streams: int, tokens: int) -> int:
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


async def rpc_streams(status: Status, streams: int, tokens: int) -> int:
    """Read ``streams`` answers over one RPC client, ids only; returns the tokens that arrived."""
    async with AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as client:

        async def one(index: int) -> int:
            call = client.complete([65 + index % 26] * 12, texts=False, max_tokens=tokens, **BODY)
            return sum([len(piece.tokens) async for piece in call.stream()])

        return sum(await asyncio.gather(*(one(index) for index in range(streams))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        replicas = [{"name": "only", "tp_size": 1}]
        file = write_config(Path(folder), replicas=replicas, max_batch_size=args.streams, max_num_tokens=2048, kv_tokens=131072)
        with deployed(file) as (_, status):
            pid = next(iter(status.routers.values()))
            doors = {"HTTP": http_streams, "RPC": rpc_streams}
            spent: dict[str, list[float]] = {door: [] for door in doors}
            for _ in range(args.runs):
                for door, load in doors.items():
                    before = cpu_seconds(pid)
                    arrived = asyncio.run(load(status, args.streams, args.tokens))
                    if arrived < args.streams * args.tokens:
                        raise SystemExit(f"{door}: {arrived} tokens arrived of {args.streams * args.tokens}")
                    spent[door].append((cpu_seconds(pid) - before) / (args.streams * args.tokens) * 1e6)
                    say(f"bench.router: {door} {spent[door][-1]:.1f} us a token")
    detail = f"{args.streams} streams x {args.tokens} tokens, whole requests, CPU of the router process"
    asked = {"HTTP": 50.0, "RPC": 10.0}
    publish(
        [Claim(name=f"router, {door}", unit="us/token", asked=asked[door], sense="<=", runs=spent[door], detail=detail) for door in doors]
    )


if __name__ == "__main__":
    main()
