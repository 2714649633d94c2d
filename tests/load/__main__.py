"""`make load`: many streams, many clients, too many requests. FakeEngine behind real routers, so that the routers are what is measured.

    python -m tests.load [streams] [rpc] [overload]

LOAD_SECONDS: length of the overload, 120 by default. Every line is measured / bound. An error, a wrong token or a lost request fails the
run; figures of speed fail it beyond three times their bound and are marked as missed before that, since the cores are shared.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.client import AsyncClient, ClientKeys
from orchestrator.control.host.control_socket import DeploymentStatus
from tests.load.report import Report, percentile, say
from tests.load.wire import Streamed, ask, stream
from tests.support.deployment import MODEL, deployed, write_config
from tests.support.ports import free_ports
from workers.engines.fake import expected_tokens
from workers.protocol.errors import TriremeError
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import RouterAddress

SLACK = 3.0
ONE = [{"name": "only", "tp_size": 1}]


def body(prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}


def oracle(prompt: str, tokens: int) -> str:
    return bytes(expected_tokens(prompt.encode(), SamplingParams(max_tokens=tokens, temperature=0.0))).decode()


# --- 500 readers of 10 tokens a second

STREAMS, STREAM_TOKENS, STREAM_STEP_MS = 500, 150, 100.0


async def read_streams(url: str) -> tuple[list[Streamed], float]:
    """All at once but for their first second; returns them and how long the last one took."""

    async def one(index: int) -> Streamed:
        await asyncio.sleep(index / STREAMS)
        return await stream(url, body(f"stream {index}", STREAM_TOKENS))

    begun = time.monotonic()
    found = await asyncio.gather(*(one(index) for index in range(STREAMS)))
    return found, time.monotonic() - begun


def streams(report: Report, folder: Path) -> None:
    file = write_config(
        folder, replicas=ONE, fake_step_ms=STREAM_STEP_MS, max_batch_size=STREAMS, max_num_tokens=2 * STREAMS,
        kv_tokens=2 * STREAMS * STREAM_TOKENS,
    )  # fmt: skip
    with deployed(file) as (_, status):
        found, seconds = asyncio.run(read_streams(status.url))
    wrong = sum(one.text() != oracle(f"stream {index}", STREAM_TOKENS) for index, one in enumerate(found))
    late = [max(0.0, gap * 1000.0 - STREAM_STEP_MS) for one in found for gap in one.gaps()]
    report.at_most(f"{STREAMS} SSE streams: errors", wrong, 0)
    report.at_least(f"{STREAMS} SSE streams: rate of each", STREAM_TOKENS / seconds, 10 * 0.9, "tok/s", slack=SLACK)
    report.at_most(f"{STREAMS} SSE streams: inter-token overhead p99", percentile(late, 0.99), 50, "ms", slack=SLACK)


# --- 200 RPC clients of 4 streams each, with CURVE

CLIENTS, PER_CLIENT, RPC_TOKENS, RPC_STEP_MS, PROCESSES = 200, 4, 400, 25.0, 2


async def read_rpc(routers: list[RouterAddress], keys: ClientKeys, first: int, clients: int) -> dict[str, float]:
    """``clients`` of them in this process; returns errors and tokens."""
    held = [AsyncClient(routers, model=MODEL, keys=keys) for _ in range(clients)]
    options = {"max_tokens": RPC_TOKENS, "temperature": 0.0, "ignore_eos": True, "texts": False}

    async def one(client: AsyncClient, index: int) -> int:
        prompt = [65 + index % 26, 65 + index // 26 % 26, 65 + index // 676]
        try:
            reply = await client.complete(prompt, **options).result()
        except TriremeError as error:
            say(f"request {index}: {error}")
            return 0
        right = reply.choices[0].tokens == expected_tokens(prompt, SamplingParams(max_tokens=RPC_TOKENS, temperature=0.0))
        return RPC_TOKENS if right else 0

    tasks = [one(client, (first + i) * PER_CLIENT + j) for i, client in enumerate(held) for j in range(PER_CLIENT)]
    found = await asyncio.gather(*tasks)
    for client in held:
        client.close()
    return {"errors": sum(count == 0 for count in found), "tokens": sum(found)}


async def share_rpc(status: DeploymentStatus) -> tuple[Counter[str], float]:
    """The clients distributed to processes of their own; returns the sums and how long the last one took."""
    share = CLIENTS // PROCESSES
    addresses = msgspec.json.encode(status.rpc).decode()
    begun = time.monotonic()
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.load", "rpc-clients", addresses, status.key_file, str(first), str(share),
            stdout=asyncio.subprocess.PIPE,
        )
        for first in range(0, CLIENTS, share)
    ]  # fmt: skip
    total = Counter[str]()
    for child in children:
        out, _ = await child.communicate()
        lines = out.decode().splitlines()
        for line in lines[:-1]:
            say(line)
        total.update(json.loads(lines[-1]))
    return total, time.monotonic() - begun


def rpc(report: Report, folder: Path) -> None:
    sequences = CLIENTS * PER_CLIENT
    deployment: dict[str, object] = {"rpc": {"host": "127.0.0.1", "port": free_ports(1)}, "admission": {"max_queue": sequences}}
    file = write_config(
        folder, deployment=deployment, replicas=ONE, fake_step_ms=RPC_STEP_MS, max_batch_size=sequences, max_num_tokens=2 * sequences,
        kv_tokens=2 * sequences * RPC_TOKENS,
    )  # fmt: skip
    with deployed(file) as (_, status):
        total, seconds = asyncio.run(share_rpc(status))
    name = f"{CLIENTS} RPC clients x {PER_CLIENT} streams with CURVE"
    report.at_most(f"{name}: errors", total["errors"], 0)
    report.at_least(f"{name}: tokens", total["tokens"], sequences * RPC_TOKENS)
    # Both ends and the replica share the cores with the router here, so this figure is told and not held.
    say(f"{name}: {total['tokens'] / seconds:.0f} tok/s over the whole run, connections and start of clients included")


# --- three times what it can do

SLOTS, OVERLOAD_TOKENS, OVERLOAD_STEP_MS, PEAK_S, TIMES = 16, 50, 20.0, 15.0, 3.0


class Tally:
    """Answers of one run. ``wrong``: neither a right answer nor a refusal as promised."""

    def __init__(self) -> None:
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.wrong: list[str] = []
        self.ends: list[float] = []

    async def ask(self, url: str, prompt: str) -> None:
        begun = time.monotonic()
        answer = await ask(url, body(prompt, OVERLOAD_TOKENS))
        seconds = time.monotonic() - begun
        if answer.status == 200 and json.loads(answer.body)["choices"][0]["text"] == oracle(prompt, OVERLOAD_TOKENS):
            self.answered.append(seconds)
            self.ends.append(time.monotonic())
        elif answer.status == 429 and "retry-after" in answer.headers and json.loads(answer.body)["error"]["code"] == "overloaded":
            self.refused.append(seconds)
        else:
            self.wrong.append(f"{prompt}: {answer.status} {answer.body[:200]!r}")


async def closed_loop(url: str, seconds: float) -> float:
    """Answers a second while as many ask as fit, and a few more."""
    tally = Tally()
    begun = time.monotonic()

    async def one(index: int) -> None:
        count = 0
        while time.monotonic() < begun + seconds:
            await tally.ask(url, f"peak {index} {count}")
            count += 1

    await asyncio.gather(*(one(index) for index in range(SLOTS + SLOTS // 2)))
    assert not tally.wrong and not tally.refused, tally.wrong[:3] or "refused below capacity"
    half = [end for end in tally.ends if begun + seconds / 4 <= end <= begun + seconds]
    return len(half) / (seconds * 3 / 4)


async def open_loop(url: str, rate: float, seconds: float) -> tuple[Tally, float, float]:
    """``rate`` requests a second whatever becomes of them. Returns the tally, answers a second of it, and how soon the first request
    after it is answered, seconds."""
    tally = Tally()
    begun = time.monotonic()
    tasks = []
    for count in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + count / rate - time.monotonic()))
        tasks.append(asyncio.create_task(tally.ask(url, f"flood {count}")))
    stopped = time.monotonic()
    within = [end for end in tally.ends if end >= begun + 5.0]
    goodput = len(within) / (stopped - begun - 5.0)
    await asyncio.gather(*tasks)
    settled = time.monotonic()
    await tally.ask(url, "after")
    return tally, goodput, time.monotonic() - settled


def overload(report: Report, folder: Path) -> None:
    seconds = float(os.environ.get("LOAD_SECONDS", "120"))
    queue_s = 4.0
    deployment: dict[str, object] = {"admission": {"max_queue": 2 * SLOTS, "queue_timeout_s": queue_s}}
    file = write_config(folder, deployment=deployment, replicas=ONE, fake_step_ms=OVERLOAD_STEP_MS, max_batch_size=SLOTS)
    with deployed(file) as (_, status):

        async def both() -> tuple[float, Tally, float, float]:
            peak = await closed_loop(status.url, PEAK_S)
            return peak, *await open_loop(status.url, TIMES * peak, seconds)

        peak, tally, goodput, after = asyncio.run(both())
    name = f"{TIMES:g} x overload for {seconds:.0f} s"
    say(f"{name}: peak {peak:.1f} requests/s, {len(tally.answered)} answered, {len(tally.refused)} refused with 429")
    for line in tally.wrong[:5]:
        say(line)
    report.at_most(f"{name}: neither answered nor refused", len(tally.wrong), 0)
    report.at_least(f"{name}: goodput of peak", goodput / peak, 0.9)
    report.at_most(
        f"{name}: longest answer", max(tally.answered), queue_s + 2 * OVERLOAD_TOKENS * OVERLOAD_STEP_MS / 1000, "s", slack=SLACK
    )
    report.at_most(f"{name}: refusal p99", percentile(tally.refused, 0.99), 0.1, "s", slack=SLACK)
    report.at_most(f"{name}: first answer afterwards", after, 2.0, "s", slack=SLACK)


PARTS = {"streams": streams, "rpc": rpc, "overload": overload}


def main(argv: list[str]) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if argv[:1] == ["rpc-clients"]:
        addresses, key_file, first, clients = argv[1:]
        routers = msgspec.json.decode(addresses, type=list[RouterAddress])
        keys = msgspec.json.decode(Path(key_file).read_bytes(), type=ClientKeys)
        print(json.dumps(asyncio.run(read_rpc(routers, keys, int(first), int(clients)))))
        return 0
    report = Report()
    for name in argv or PARTS:
        with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
            PARTS[name](report, Path(folder))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
