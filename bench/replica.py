"""Cost of a replica apart from its arithmetic: idle CPU, the leader's share of a step, memory of a rank, memory of a conversion.

python -m bench.replica [--runs 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.report import Claim, publish, say
from bench.router import cpu_seconds, rpc_streams
from orchestrator.control.host.control_socket import DeploymentStatus
from orchestrator.model_store import DEFAULT_MODEL, pull
from tests.support.deployment import deployed, write_config

MB = 1e6
#: Seconds over which idle CPU is read.
IDLE_S = 10.0


def ranks(status: DeploymentStatus) -> dict[str, int]:
    """Process ids of all ranks by "replica/rank"."""
    return {f"{row.name}/{rank}": pid for model in status.models for row in model.replicas for rank, _, pid in row.pids}


@contextmanager
def portable(cache: Path) -> Iterator[DeploymentStatus]:
    """The default model as tp=2 and as pp=2, ready and idle."""
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        replicas = [{"name": "tp2", "tp_size": 2}, {"name": "pp2", "pp_size": 2}]
        model = {"engine": "portable", "path": DEFAULT_MODEL, "kv_tokens": 2048, "max_seq_len": 2048, "replicas": replicas}
        file = write_config(Path(folder), deployment={"cache_dir": str(cache)}, **model)
        with deployed(file) as (_, status):
            yield status


def standing_claims(cache: Path, runs: int) -> list[Claim]:
    """Idle CPU and resident memory of the ranks of a real model."""
    with portable(cache) as status:
        pids = ranks(status)
        idle: list[float] = []
        for _ in range(runs):
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            time.sleep(IDLE_S)
            idle.append(max(cpu_seconds(pid) - before[name] for name, pid in pids.items()) / IDLE_S)
        memory = [over_shard(name, pid, status) for name, pid in pids.items()]
    return [
        Claim(name="idle replica, busiest rank", unit="cores", asked=0.05, sense="<=", runs=idle, detail=f"over {IDLE_S:g} s each"),
        Claim(
            name="rank memory beyond its shard, small KV pool included",
            unit="MB",
            asked=350,
            sense="<=",
            runs=[max(memory)],
            detail="RSS, largest of 4 ranks",
        ),
    ]


def over_shard(name: str, pid: int, status: DeploymentStatus) -> float:
    """RSS of a rank less its shard file, in MB. The KV pool (2,048 tokens, 94 MB per model) is included: its pages are used only when
    requests run."""
    replica, rank = name.split("/")
    row = next(row for model in status.models for row in model.replicas if row.name == replica)
    spec = json.loads(Path(row.log_dir, "spec.json").read_bytes())
    shard = Path(spec["artifact"], f"rank{rank}.safetensors").stat().st_size
    return float(psutil.Process(pid).memory_info().rss - shard) / MB


def leader_claims(runs: int, sequences: int = 64, tokens: int = 500) -> list[Claim]:
    """CPU of the leader process per step: scheduler, tables, encoding, sockets, and FakeEngine's integer model."""
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        replicas = [{"name": "only", "tp_size": 1}]
        file = write_config(
            Path(folder), fake_step_ms=0, replicas=replicas, max_batch_size=sequences, max_num_tokens=1024, kv_tokens=131072
        )
        with deployed(file) as (_, status):
            pid = ranks(status)["only/0"]
            spent = []
            for _ in range(runs):
                before = cpu_seconds(pid)
                asyncio.run(rpc_streams(status, sequences, tokens))
                spent.append((cpu_seconds(pid) - before) / tokens * 1e3)
    detail = f"{sequences} sequences, {tokens} steps, CPU of the whole leader process, FakeEngine's model included"
    return [Claim(name="leader's own share of a step", unit="ms", asked=1.0, sense="<=", runs=spent, detail=detail)]


def conversion_claims(cache: Path) -> list[Claim]:
    """Peak memory of converting the default model to tp=2."""
    source = pull(DEFAULT_MODEL, cache)
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "trireme", "convert", str(source), "-o", str(Path(folder, "out")), "--tp-size", "2"]
        begun = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)
        seconds = time.perf_counter() - begun
    # The only large child so far: Linux keeps the maximum over all ended children.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / MB
    return [Claim(name="conversion, peak memory", unit="MB", asked=1000, sense="<=", runs=[peak], detail=f"GGUF to tp=2, {seconds:.1f} s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trireme")
    args = parser.parse_args()
    for what, measure in (
        ("conversion", lambda: conversion_claims(args.cache)),
        ("idle CPU and memory", lambda: standing_claims(args.cache, args.runs)),
        ("leader", lambda: leader_claims(args.runs)),
    ):
        say(f"bench.replica: {what}")
        publish(measure())


if __name__ == "__main__":
    main()
