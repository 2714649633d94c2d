"""Four or eight GPUs of one host in ten minutes: agreement of layouts, the 70B shape, several replicas behind one router, a lost rank.

python -m bench.many_gpus [--only layouts --only sums ...] [--output FILE]

One JSON line per result. The parts are independent and bounded: if one fails, this is reported and the next one runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench import collectives, gpu
from bench.gpu import ROOT, WORKLOADS, Case, launched, spec_of, write_shape
from bench.report import commit, facts, record, say
from bench.router import cpu_seconds
from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.__main__ import GPU_ENVIRONMENT
from workers.protocol.specs import Parallel

Lines = Iterator[dict[str, Any]]
#: tp x pp that use every GPU; the first and the last also carry the 70B shape.
LAYOUTS = {4: [(4, 1), (1, 4), (2, 2)], 8: [(8, 1), (2, 4), (4, 2)]}
#: Number of requests per replica, and prompt and output tokens of each.
REQUESTS, ISL, OSL = WORKLOADS["balanced"]
READY_S = 75.0
#: Longest that a layout of the 70B shape and one load may take, seconds.
SPEED_S, LOAD_S = 95.0, 60.0
#: Prompts consist of smaller ids.
PROMPT_IDS = 128_000


def layouts(count: int, folder: Path) -> Lines:
    """Numerics rules 1 to 3 on a small model that no number of ranks divides evenly."""
    model = tiny_model(folder, heads=18, kv_heads=3, hidden=288, ffn=520, vocab=331, layers=9, head_dim=32)
    report = folder / "report.json"
    told = json.dumps({"model": str(model), "layouts": LAYOUTS[count], "report": str(report)})
    environment = os.environ | GPU_ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [*launched(count), "mpi4py", "-m", "tests.gpu.layouts_program", told]
    done = subprocess.run(argv, cwd=ROOT, env=environment, timeout=100, check=False, capture_output=True, text=True)
    if done.returncode:
        say(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    held = done.returncode == 0
    yield {"part": "layouts", "gpus": count, "held": held, "largest_difference": json.loads(report.read_text()) if held else None}


def sums(count: int, folder: Path) -> Lines:
    found = collectives.run(count)
    yield from ({"part": "sums", **line} for line in found)
    yield {"part": "sums", "ranks": count, **collectives.switches(found)}


def speed(count: int, folder: Path) -> Lines:
    """The 70B shape over all GPUs."""
    shape = write_shape(folder / "70b", "70b")
    for tp, pp in (LAYOUTS[count][0], LAYOUTS[count][-1]):
        workloads = [(name, *WORKLOADS[name]) for name in ("latency-b1", "balanced", "decode-heavy")]
        yield from (
            {"part": "speed", **line}
            for line in gpu.run(spec_of(Case("70b", Parallel(tp=tp, pp=pp)), shape), {"workloads": workloads}, SPEED_S)
        )


@contextmanager
def replicas(folder: Path, count: int, tp: int) -> Iterator[tuple[ControlClient, DeploymentStatus]]:
    """``count`` replicas of the 8B shape, each over ``tp`` GPUs, behind one router."""
    write_shape(folder, "8b")
    tiny_tokenizer(folder)
    made = folder / f"{count}x{tp}"
    made.mkdir()
    rows = [{"name": f"r{index}", "tp_size": tp} for index in range(count)]
    engine = {"engine": "portable", "device": "cuda", "dtype": "bf16", "load_format": "dummy", "wait": "spin", "prefix_cache": False}
    limits = {"max_seq_len": 4096, "max_batch_size": 512, "max_num_tokens": 8192, "kv_tokens": 0}
    admission = {"max_queue": 4096, "request_timeout_s": 120}
    with deployed(
        write_config(made, path=str(folder), replicas=rows, deployment={"admission": admission}, **engine, **limits), ready_s=READY_S
    ) as running:
        yield running


async def load(endpoints: list[str], requests: int, disturb: Callable[[], None] | None = None) -> int:
    """Stream ``requests`` answers at once; the tokens that came. ``disturb`` is called when a quarter of them have arrived. Raises on any
    error, and if a token is missing or arrives twice."""
    arrived, quarter = 0, asyncio.Event()

    async def one(client: AsyncClient, index: int) -> None:
        nonlocal arrived
        prompt = [(31 * index + 17 * place) % PROMPT_IDS for place in range(ISL)]
        call = client.complete(prompt, texts=False, max_tokens=OSL, temperature=1.0, seed=index, ignore_eos=True)
        had = 0
        async for piece in call.stream():
            if piece.first != had:
                raise AssertionError(f"request {index}: token {piece.first} after {had}")
            had += len(piece.tokens)
            arrived += len(piece.tokens)
            if arrived * 4 > requests * OSL:
                quarter.set()
        if had != OSL:
            raise AssertionError(f"request {index} ended after {had} tokens")

    async with AsyncClient(endpoints, model=MODEL) as client, asyncio.timeout(LOAD_S), asyncio.TaskGroup() as group:
        for index in range(requests):
            group.create_task(one(client, index))
        if disturb is not None:
            await quarter.wait()
            await asyncio.to_thread(disturb)
    return arrived


def client(endpoints: list[str]) -> None:
    """One client process: it reports that it is ready, waits for a line on its input, then prints its tokens and the time of the last
    one."""
    print(flush=True)
    at = float(sys.stdin.readline())
    time.sleep(at - time.monotonic())
    tokens = asyncio.run(load(endpoints, REQUESTS))
    print(json.dumps({"tokens": tokens, "ended": time.monotonic()}), flush=True)


def clients(endpoints: list[str], count: int) -> tuple[int, float]:
    """``count`` client processes at once, so that no client limits the replicas; (tokens, seconds)."""
    argv = [sys.executable, "-m", "bench.many_gpus", "--client", json.dumps(endpoints)]
    running = [subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for each in running:
            assert each.stdout is not None
            each.stdout.readline()
        at = time.monotonic() + 0.5
        for each in running:
            assert each.stdin is not None
            each.stdin.write(f"{at}\n")
            each.stdin.flush()
        ends = [json.loads(each.communicate(timeout=2 * LOAD_S)[0]) for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    return sum(end["tokens"] for end in ends), max(end["ended"] for end in ends) - at


def served(status: DeploymentStatus) -> list[int]:
    """Output tokens that each replica has generated so far, by name."""
    series = text_string_to_metric_families(httpx.get(f"{status.url}/metrics", timeout=10, trust_env=False).text)
    samples = [sample for family in series for sample in family.samples if sample.name == "trireme_replica_generation_tokens_total"]
    return [int(sample.value) for sample in sorted(samples, key=lambda sample: sample.labels["replica"])]


def together(tp: int, count: int, folder: Path) -> Lines:
    """Compares several replicas behind one router with the same number of single replicas; with two replicas, also measures the effect of a
    rank's death under load."""
    with replicas(folder, 1, tp) as (_, status):
        endpoints = [address.endpoint for address in status.rpc]
        asyncio.run(load(endpoints, 64))
        tokens, seconds = clients(endpoints, 1)
    alone, number = tokens / seconds, count // tp
    with replicas(folder, number, tp) as (control, status):
        endpoints = [address.endpoint for address in status.rpc]
        asyncio.run(load(endpoints, 64 * number))
        router = next(iter(status.routers.values()))
        before, dealt = cpu_seconds(router), served(status)
        tokens, seconds = clients(endpoints, number)
        spent = cpu_seconds(router) - before
        dealt = [after - former for after, former in zip(served(status), dealt, strict=True)]
        total = tokens / seconds
        yield {
            "part": "replicas", "shape": "8b", "replicas": number, "tp": tp, "alone_tok_s": round(alone), "total_tok_s": round(total),
            "share": round(total / (alone * number), 3), "asked": 0.97, "router_us_token": round(spent / tokens * 1e6, 2),
            "router_busy": round(spent / seconds, 3), "replica_tokens": dealt,
        }  # fmt: skip
        if tp > 1:
            yield lost_rank(control, endpoints)


class MemoryWatch:
    """When the memory of each of ``gpus`` was first below ``free_below`` bytes, seconds since :meth:`start`."""

    def __init__(self, gpus: list[int], free_below: int) -> None:
        self._gpus, self._free_below = gpus, free_below
        self.freed: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._begun = time.monotonic()
        self._thread.start()

    def _watch(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        handles = {gpu: pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in self._gpus}
        while len(self.freed) < len(handles) and not self._over.wait(0.01):
            for number, handle in handles.items():
                if number not in self.freed and pynvml.nvmlDeviceGetMemoryInfo(handle).used < self._free_below:
                    self.freed[number] = time.monotonic() - self._begun

    def end(self) -> None:
        self._over.set()
        self._thread.join(5)


def lost_rank(control: ControlClient, endpoints: list[str]) -> dict[str, Any]:
    """SIGKILL of rank 1 of the first replica under load."""
    victim = next(row for model in control.status().models for row in model.replicas)
    pids = {rank: pid for rank, _, pid in victim.pids}
    environment = Path(f"/proc/{pids[0]}/environ").read_bytes().split(b"\0")
    shown = next(each for each in environment if each.startswith(b"CUDA_VISIBLE_DEVICES="))
    watch = MemoryWatch([int(gpu) for gpu in shown.partition(b"=")[2].split(b",")], 4 << 30)
    times: dict[str, float] = {}

    def kill() -> None:
        watch.start()
        begin = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        wait_for_state(control, "DEGRADED", 30)
        times["noticed_s"] = round(time.monotonic() - begin, 2)
        wait_for_state(control, "READY", READY_S)
        times["ready_s"] = round(time.monotonic() - begin, 2)

    begin, requests = time.monotonic(), REQUESTS * 2
    tokens = asyncio.run(load(endpoints, requests, kill))
    seconds = time.monotonic() - begin
    watch.end()
    freed = {str(gpu): round(when, 2) for gpu, when in watch.freed.items()}
    return {
        "part": "failover",
        "shape": "8b",
        "replicas": 2,
        "tp": len(pids),
        "lost": requests * OSL - tokens,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "gpu_memory_free_s": freed,
        "asked_s": 5,
        **times,
    }


PARTS: dict[str, Callable[[int, Path], Lines]] = {
    "layouts": layouts,
    "sums": sums,
    "speed": speed,
    "pairs": partial(together, 2),
    "singles": partial(together, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=tuple(PARTS))
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--commit", default=commit())
    parser.add_argument("--client", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        client(args.client)
        return
    count = gpu.gpus()
    if count not in LAYOUTS:
        raise SystemExit(f"4 or 8 GPUs are needed, {count} are visible")
    failed = 0
    for name in args.only or PARTS:
        say(f"bench.many_gpus: {name}")
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
            try:
                for line in PARTS[name](count, Path(folder)):
                    record(facts(args.commit) | line, args.output)
            except Exception as error:  # a failed part must not stop the others
                failed += 1
                say(f"bench.many_gpus: {name} failed: {type(error).__name__}: {error}")
        say(f"bench.many_gpus: {name} took {time.monotonic() - begin:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
