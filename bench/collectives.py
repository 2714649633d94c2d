"""How long a sum over all ranks takes by its size, on every way that NVIDIA GPUs of one host offer, alone and with the norm after it: one
JSON line a size.

python -m bench.collectives [--ranks 2] [--output FILE]

Times are of one sum inside a captured graph of twenty, which is how the engine runs them. The sizes from which another way is quicker are
what ``ONE_SHOT_BYTES`` and ``TWO_SHOT_BYTES`` of :mod:`workers.engine.nccl` and ``WORD_BYTES`` of :mod:`workers.engine.sum_norm` should be
on this kind of host.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import ROOT, gpus, launched
from bench.report import record, say
from workers.__main__ import GPU_ENVIRONMENT

SIZES = [1 << power for power in range(12, 27)]
#: Largest sums, bytes, that our own kernel is tried with.
ONE_SHOT_LIMIT = 4 << 20
#: Rows and their lengths of sums that are added and normed.
ROWS, HIDDEN = (1, 16, 32, 64, 128, 256, 512, 2048, 8192), (4096, 8192)
#: Sums in one graph, and replays of it.
REPEATS, REPLAYS = 20, 15
BOUND_S = 120.0


def run(ranks: int) -> list[dict[str, Any]]:
    """The lines of ``ranks`` ranks; none where they fail, which is said."""
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
    """The largest sizes, bytes, up to which one shot, and then two shots, are quicker than the other ways; with the norm, words."""
    words = max((line["bytes"] for line in lines if line.get("words_us", math.inf) <= line.get("flags_us", math.inf)), default=0)
    lines = [line for line in lines if "hidden" not in line]
    one = max(
        (line["bytes"] for line in lines if line.get("one_shot_us", math.inf) <= min(line["two_shot_us"], line["nccl_us"])), default=0
    )
    two = max((line["bytes"] for line in lines if line["two_shot_us"] <= line["nccl_us"]), default=0)
    return {"one_shot_bytes": one, "two_shot_bytes": max(one, two), "word_bytes": words}


def rank() -> None:
    """One rank of the measurement; rank 0 prints."""
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric
    from mpi4py import MPI

    from workers.engine.nccl import TWO_SHOT_BYTES, World
    from workers.engine.one_shot import OneShot
    from workers.engine.sum_norm import WORD_ROWS, SumNorm
    from workers.model.kernels import kernels_for

    comm = MPI.COMM_WORLD
    device = torch.device("cuda", comm.Get_rank())
    torch.cuda.set_device(device)
    world = World.join(comm, device, one_host=True)
    group = dist.group.WORLD
    assert group is not None
    shared = symmetric.empty(SIZES[-1], dtype=torch.uint8, device=device)
    symmetric.rendezvous(shared, group=group.group_name)
    one_shot = OneShot(group, device, ONE_SHOT_LIMIT)

    def timed(program: Callable[[], object]) -> float:
        """Microseconds of one ``program`` inside a graph; the largest over all ranks."""
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            for _ in range(3):
                program()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process (NCCL's watchdog) may ask the driver questions meanwhile.
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
        slowest = torch.tensor([statistics.median(times[3:])], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return round(float(slowest), 2)

    def line(size: int) -> dict[str, Any]:
        x = torch.randn(size // 2, device=device).bfloat16()
        mine, out = shared[:size].view(torch.bfloat16), torch.empty_like(x)
        ops, name = torch.ops.symm_mem, group.group_name
        found = {
            "bytes": size,
            "ranks": comm.Get_size(),
            "nccl_us": timed(lambda: dist.all_reduce(x)),
            "torch_one_shot_us": timed(lambda: ops.one_shot_all_reduce_copy(mine, x, "sum", name)),
            "two_shot_us": timed(lambda: (mine.copy_(x), ops.two_shot_all_reduce_out(mine, "sum", name, out))),
        }
        return found | ({"one_shot_us": timed(lambda: one_shot(x))} if one_shot.takes(x) else {})

    members = world.group([list(range(comm.Get_size()))], symmetric_bytes=TWO_SHOT_BYTES)
    kernels = kernels_for(device)

    def with_norm(hidden: int, rows: int, ways: dict[str, SumNorm]) -> dict[str, Any]:
        branch, residual = (torch.randn(rows, hidden, device=device).bfloat16() for _ in range(2))
        weight = torch.ones(hidden, device=device).bfloat16()
        found = {"bytes": 2 * rows * hidden, "ranks": comm.Get_size(), "hidden": hidden, "rows": rows}
        found["apart_us"] = timed(lambda: kernels.add_rms_norm(residual, members.all_reduce(branch), weight, 1e-5))
        for name, way in ways.items():
            if name == "flags" or rows <= WORD_ROWS:
                found[f"{name}_us"] = timed(lambda way=way: way(residual, branch, weight, 1e-5, narrows=False))
        return found

    def say_so(found: dict[str, Any]) -> None:
        if comm.Get_rank() == 0:
            print(json.dumps({"gpu": torch.cuda.get_device_name(), **found}), flush=True)

    with torch.inference_mode():
        for size in SIZES:
            say_so(line(size))
        for hidden in HIDDEN:
            ways = {"words": SumNorm(group, device, hidden, word_bytes=1 << 30), "flags": SumNorm(group, device, hidden, word_bytes=0)}
            for rows in ROWS:
                say_so(with_norm(hidden, rows, ways))
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
