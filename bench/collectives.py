"""Times of a sum over all ranks by its size, with every method that NVIDIA GPUs of one host offer, alone and with the following norm: one
JSON line per size.

python -m bench.collectives [--ranks 2] [--output FILE]

Times are of one sum inside a captured graph of twenty, which is how the engine runs them. The sizes from which another method is faster are
the values that ``ONE_SHOT_BYTES`` and ``TWO_SHOT_BYTES`` of :mod:`workers.distributed.nccl_group` and ``WORD_BYTES`` of
:mod:`workers.distributed.allreduce_norm` should have on this kind of host.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from bench.gpu import ROOT, gpus, launched
from bench.report import record, say
from workers.__main__ import GPU_ENVIRONMENT

SIZES = [1 << power for power in range(12, 27)]
#: Largest sums, bytes, that our own kernel is tried with.
ONE_SHOT_LIMIT = 4 << 20
#: Rows and row lengths of the sums that are added to the residual and normalized.
ROWS, HIDDEN = (1, 16, 32, 64, 128, 256, 512, 2048, 8192), (4096, 8192)
#: Sums in one graph, and replays of it.
REPEATS, REPLAYS = 20, 15
BOUND_S = 120.0


def run(ranks: int) -> list[dict[str, Any]]:
    """The lines of ``ranks`` ranks; none if they fail, which is reported."""
    environment = os.environ | GPU_ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [*launched(ranks), "bench.collectives", "--rank"]
    try:
        done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=BOUND_S)
    except subprocess.TimeoutExpired:
        say(f"not done within {BOUND_S:.0f} s")
        return []
    if done.returncode:
        say(f"the ranks ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def switches(lines: list[dict[str, Any]]) -> dict[str, int]:
    """The largest sizes, bytes, up to which one shot, and then two shots, are faster than the other methods; and with the norm, words."""

    def largest(way: str, *others: str) -> int:
        fair = [line for line in lines if way in line]
        return max((line["bytes"] for line in fair if line[way] <= min(line.get(other, math.inf) for other in others)), default=0)

    one = largest("one_shot_us", "two_shot_us", "nccl_us")
    return {
        "one_shot_bytes": one,
        "two_shot_bytes": max(one, largest("two_shot_us", "nccl_us")),
        "word_bytes": largest("words_us", "flags_us"),
    }


def timed(program: Callable[[], object]) -> float:
    """Microseconds of one ``program`` inside a graph; the largest over all ranks."""
    import torch
    import torch.distributed as dist

    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        for _ in range(3):
            program()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    # Other threads of this process (NCCL's watchdog) may call the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            program()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / REPEATS)
    del graph
    slowest = torch.tensor([statistics.median(times[3:])], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return round(float(slowest), 2)


def sums(group: Any, device: Any) -> Iterator[dict[str, Any]]:
    """A line for each of ``SIZES``."""
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    from workers.distributed.one_shot_allreduce import OneShotAllReduce

    shared = symmetric.empty(SIZES[-1], dtype=torch.uint8, device=device)
    symmetric.rendezvous(shared, group=group.group_name)
    one_shot, ops, name = OneShotAllReduce(group, device, ONE_SHOT_LIMIT), torch.ops.symm_mem, group.group_name
    for size in SIZES:
        x = torch.randn(size // 2, device=device).bfloat16()
        mine, out = shared[:size].view(torch.bfloat16), torch.empty_like(x)
        ways: dict[str, Callable[[], object]] = {
            "nccl_us": partial(dist.all_reduce, x),
            "torch_one_shot_us": partial(ops.one_shot_all_reduce_copy, mine, x, "sum", name),
            "two_shot_us": lambda mine=mine, x=x, out=out: (mine.copy_(x), ops.two_shot_all_reduce_out(mine, "sum", name, out)),
        }
        if one_shot.supports(x):
            ways["one_shot_us"] = partial(one_shot, x)
        yield {"bytes": size} | {way: timed(program) for way, program in ways.items()}


def sums_with_norm(group: Any, members: Any, device: Any) -> Iterator[dict[str, Any]]:
    """A line for each of ``HIDDEN`` and ``ROWS``; ``members``: the engine's own group of the same ranks."""
    import torch

    from workers.distributed.allreduce_norm import WORD_ROWS, AllReduceNorm
    from workers.kernels import kernels_for

    kernels = kernels_for(device)
    for hidden in HIDDEN:
        words, flags = (AllReduceNorm(group, device, hidden, word_bytes=limit) for limit in (1 << 30, 0))
        weight = torch.ones(hidden, device=device).bfloat16()
        for rows in ROWS:
            branch, residual = (torch.randn(rows, hidden, device=device).bfloat16() for _ in range(2))
            ways: dict[str, Callable[[], object]] = {
                "apart_us": lambda branch=branch, residual=residual, weight=weight: kernels.add_rms_norm(
                    residual, members.all_reduce(branch), weight, 1e-5
                ),
                "flags_us": partial(flags, residual, branch, weight, 1e-5, fp8=False),
            }
            if rows <= WORD_ROWS:
                ways["words_us"] = partial(words, residual, branch, weight, 1e-5, fp8=False)
            yield {"bytes": 2 * rows * hidden, "hidden": hidden, "rows": rows} | {way: timed(program) for way, program in ways.items()}


def rank() -> None:
    """One rank of the measurement; rank 0 prints."""
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    from workers.distributed.nccl_group import TWO_SHOT_BYTES, NcclWorld

    comm = MPI.COMM_WORLD
    device = torch.device("cuda", comm.Get_rank())
    torch.cuda.set_device(device)
    world = NcclWorld.join(comm, device, one_host=True)
    members = world.group([list(range(comm.Get_size()))], symmetric_bytes=TWO_SHOT_BYTES)
    group = dist.group.WORLD
    with torch.inference_mode():
        for found in chain(sums(group, device), sums_with_norm(group, members, device)):
            if comm.Get_rank() == 0:
                print(json.dumps({"gpu": torch.cuda.get_device_name(), "ranks": comm.Get_size()} | found), flush=True)
    world.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank()
        return
    lines = run(args.ranks or gpus())
    for each in lines:
        record(each, args.output)
    record(switches(lines), None)


if __name__ == "__main__":
    main()
