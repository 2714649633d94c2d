"""Compares the portable engine on the CPU with transformers, and tp=2 with tp=1: pairs alternate in one run, medians are compared with the
claims.

python -m bench.engine [--runs 5] [--artifact DIR] [--only decode|mixed|tp]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import msgspec

from bench.report import Claim, publish, say
from orchestrator.model_store import resolve
from workers.protocol.specs import Parallel

#: One thread per rank and no spinning OpenMP threads: shared cores otherwise fall from 18 tok/s to 2.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def measured(module: str, *flags: str, ranks: int = 1) -> float:
    """Output tok/s of one run of ``module`` in processes of its own."""
    argv = [sys.executable, "-m", module, *flags]
    if ranks > 1:
        argv = [str(MPIEXEC), "-n", str(ranks), *argv]
    done = subprocess.run(argv, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["tok_s"])


def mixed_requests(count: int = 32, seed: int = 20) -> list[tuple[float, list[int], int]]:
    """A fixed list with mixed prompt (16 to 256) and output (8 to 64) lengths; all arrive at 0 until :func:`poisson` spreads them."""
    draw = random.Random(seed)
    return [
        (0.0, [draw.randrange(100, 40000) for _ in range(draw.choice((16, 32, 64, 128, 256)))], draw.randrange(8, 65)) for _ in range(count)
    ]


def poisson(requests: list[tuple[float, list[int], int]], rate: float, seed: int = 6) -> list[tuple[float, list[int], int]]:
    """The same requests with exponential gaps of mean 1 / ``rate`` seconds."""
    draw, now = random.Random(seed), 0.0
    spread = []
    for _, prompt, output in requests:
        spread.append((now, prompt, output))
        now += draw.expovariate(rate)
    return spread


def decode_claims(artifact: str, runs: int, dtype: str) -> list[Claim]:
    flags = ("--artifact", artifact, "--dtype", dtype, "--threads", "2")
    ratios, ours, theirs = [], [], []
    for _ in range(runs):
        theirs.append(measured("bench.reference", *flags))
        ours.append(measured("bench.drive", *flags))
        ratios.append(ours[-1] / theirs[-1])
    detail = f"{dtype}, 2 threads, tok/s: {median(ours):.1f} against {median(theirs):.1f}"
    return [Claim(name=f"decode batch 1, {dtype}: engine / transformers", unit="x", asked=1.0, sense=">=", runs=ratios, detail=detail)]


def mixed_claims(artifact: str, runs: int, dtype: str) -> list[Claim]:
    requests = mixed_requests()
    outputs = sum(output for _, _, output in requests)
    ratios, ours, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        plain, spread = Path(folder, "requests.json"), Path(folder, "arrivals.json")
        plain.write_bytes(msgspec.json.encode(requests))
        for _ in range(runs):
            theirs.append(measured("bench.reference", "--artifact", artifact, "--dtype", dtype, "--threads", "2", "--requests", str(plain)))
            rate = 6 * theirs[-1] * len(requests) / outputs
            spread.write_bytes(msgspec.json.encode(poisson(requests, rate)))
            ours.append(measured("bench.drive", "--artifact", artifact, "--dtype", dtype, "--threads", "2", "--arrivals", str(spread)))
            ratios.append(ours[-1] / theirs[-1])
    detail = f"{dtype}, 32 requests, Poisson at 6 x, output tok/s: {median(ours):.1f} against {median(theirs):.1f}"
    return [Claim(name=f"mixed load, {dtype}: engine / transformers", unit="x", asked=3.0, sense=">=", runs=ratios, detail=detail)]


def tp_claims(artifact: str, runs: int, dtype: str) -> list[Claim]:
    claims = []
    for batch in (1, 16):
        ratios, one, two = [], [], []
        for _ in range(runs):
            flags = ("--artifact", artifact, "--dtype", dtype, "--batch", str(batch))
            one.append(measured("bench.drive", *flags, "--threads", "2"))
            two.append(measured("bench.drive", *flags, "--threads", "1", "--tp", "2", ranks=2))
            ratios.append(two[-1] / one[-1])
        detail = f"{dtype}, tok/s: {median(two):.1f} against {median(one):.1f}"
        name = f"tp=2 on 2 cores / tp=1 with 2 threads, batch {batch}"
        claims.append(Claim(name=name, unit="x", asked=0.8, sense=">=", runs=ratios, detail=detail))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trireme")
    parser.add_argument("--only", choices=("decode", "mixed", "tp"))
    args = parser.parse_args()
    artifact = str(resolve("smollm2-135m-instruct", parallel=Parallel(), dtype="fp32", cache=args.cache))
    for name, claims in (("decode", decode_claims), ("mixed", mixed_claims), ("tp", tp_claims)):
        if args.only in (None, name):
            say(f"bench.engine: {name}, {args.runs} alternating runs")
            publish(claims(artifact, args.runs, args.dtype))


if __name__ == "__main__":
    main()
