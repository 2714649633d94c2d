"""Ranks with a GPU each: the groups conform, pipelines are one stage to the bit, ordered sums are the same shards in one process.

Run under mpiexec by ``test_ranks.py`` and ``bench.many_gpus`` with the ``layouts`` that the world's ranks can form. Every rank computes its
references on its own GPU; rank 0 writes the report: the largest relative difference of plain sums, by layout.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from tests.mpi.steps import plans
from tests.reference.conformance import conform, in_threads
from tests.reference.shards import make_stage, whole_weights
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Group, Solo, ordered_sum
from workers.distributed.nccl_group import TWO_SHOT_BYTES, NcclWorld
from workers.distributed.rank_groups import RankGroups, split
from workers.kernels import kernels_for, step_ends
from workers.models.decoder import DecoderStage
from workers.protocol.specs import Parallel, PortableSpec, ReplicaSpec
from workers.runner.device import CudaDevice, pin_numerics
from workers.runner.gpu_runner import GpuRunner
from workers.runner.kv_cache import KvCache


class Plain(CudaDevice):
    """Nothing captured: threads of one process cannot capture at the same time."""

    def capture(self, program: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        return program


def play(stage: DecoderStage, device: torch.device, groups: RankGroups) -> list[torch.Tensor]:
    """Logits of every step of :func:`tests.mpi.steps.plans`, all of whose sequences use the torch sampler, where logits can be seen."""
    seen: list[torch.Tensor] = []
    if stage.shard.last:
        plain = stage.logits

        def recording(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(plain(hidden))
            return seen[-1].clone()

        stage.logits = recording  # type: ignore[method-assign]
    cache = KvCache(stage.model, stage.shard, blocks=64, block_size=16, dtype=stage.dtype, device=device)
    runner = GpuRunner(
        stage, cache, Plain(device), step_ends, groups, slots=4, max_seq_len=512, max_num_tokens=256, depth=groups.pipeline.size + 1
    )
    runner.capture()
    for plan in plans():
        answer = runner.issue(plan)
        if answer is not None:
            answer.result()
    torch.cuda.synchronize()
    return seen


def _shard(alone: Callable[[Parallel, int, Group], list[torch.Tensor]], tp: int, group: Group) -> list[torch.Tensor]:
    return alone(Parallel(tp=tp), group.rank, group)


def sums_of_every_size(group: Group, device: torch.device) -> None:
    """Small sums in any order of sizes and types, eagerly and replayed, are in rank order to the bit: nobody reads what is not yet, or no
    longer, there."""
    draw = random.Random(3)
    for turn in range(400):
        dtype, count = draw.choice((torch.float32, torch.bfloat16)), 2 * draw.choice((1, 3, 300, 2048, 5000, 30_000, 60_000))
        parts = torch.stack([torch.randn(count, generator=torch.Generator().manual_seed(turn * group.size + r)) for r in range(group.size)])
        parts = parts.to(dtype).to(device)
        found = group.all_reduce(parts[group.rank].clone())
        assert torch.equal(found, ordered_sum(parts.float()).to(dtype)), (turn, dtype, count)
    x = torch.zeros(4096, device=device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        total = group.all_reduce(group.all_reduce(x[:3000]))
    for turn in range(200):
        x.fill_(turn + group.rank)
        graph.replay()
        assert bool((total == group.size * sum(turn + r for r in range(group.size))).all()), turn


def sums_with_their_norm(group: Group, device: torch.device) -> None:
    """One kernel gives what the three operations give: the sum's bits, and the norm's but for the order of its own sum."""
    kernels, draw_rows = kernels_for(device), random.Random(5)
    sizes = (1, 2, 17, 40, 64) if group.size > 2 else (1, 2, 17, 64, 65, 130, 263, 264, 265, 700, 1900)
    for hidden in (288, 4096):
        fused = group.allreduce_norm(hidden)
        assert fused is not None
        for turn in range(60):
            draw = torch.Generator().manual_seed(turn)
            rows, fp8 = draw_rows.choice(sizes), hidden == 4096 and turn % 2 == 1
            weight, residual = (torch.randn(*shape, generator=draw).bfloat16().to(device) for shape in ((hidden,), (rows, hidden)))
            branch = torch.randn(group.size, rows, hidden, generator=draw).bfloat16().to(device)[group.rank]
            assert fused.supports(branch)
            total, together = group.all_reduce(branch.clone()), residual.clone()
            found = fused(together, branch, weight, 1e-5, fp8=fp8)
            expected = (kernels.add_rms_norm_fp8 if fp8 else kernels.add_rms_norm)(residual, total, weight, 1e-5)
            assert torch.equal(together, residual), (hidden, turn)
            for a, b in zip(found, expected, strict=True) if fp8 else ((found, expected),):
                assert (a.float() - b.float()).norm() <= 2e-3 * b.float().norm(), (hidden, turn, fp8)
        x, ones = torch.zeros(max(sizes), hidden, device=device).bfloat16(), torch.ones(hidden, device=device).bfloat16()
        totals = [torch.zeros_like(x[:rows]) for rows in sizes]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for total in totals:
                total.zero_()
                fused(total, x[: len(total)], ones, 1e-5, fp8=False)
        for turn in range(200):
            x.fill_(turn % 50 + group.rank)
            graph.replay()
            whole = sum(turn % 50 + r for r in range(group.size))
            assert all(bool((total == whole).all()) for total in totals), (hidden, turn)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    pin_numerics()
    folder = Path(arguments["model"])
    model, weights = open_artifact(folder).model, whole_weights(folder)

    everyone = [list(range(comm.Get_size()))]
    nccl = NcclWorld.join(comm, device, one_host=True)
    conform(nccl.group(everyone), device)
    conform(nccl.group(everyone, deterministic=True), device)
    symmetric = nccl.group(everyone, symmetric_bytes=TWO_SHOT_BYTES)
    conform(symmetric, device)
    sums_of_every_size(symmetric, device)
    sums_with_their_norm(symmetric, device)
    nccl.leave()

    def alone(parallel: Parallel, at: int, group: Group) -> list[torch.Tensor]:
        torch.cuda.set_device(device)  # of this thread
        stage = make_stage(model, weights, parallel, at, tensor=group, device=device)
        return play(stage, device, RankGroups(tensor=group))

    whole = alone(Parallel(), 0, Solo())
    largest = max(float(logits.abs().max()) for logits in whole)
    layouts = [Parallel(tp=tp, pp=pp) for tp, pp in arguments["layouts"]]
    shards = {tp: in_threads(tp, partial(_shard, alone, tp)) for tp in {parallel.tp for parallel in layouts} - {1}}
    report: dict[str, float] = {}
    for parallel, deterministic in product(layouts, (True, False)):
        if deterministic and parallel.tp == 1:
            continue
        engine = PortableSpec(device="cuda", deterministic=deterministic)
        context = split(ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=engine), comm)
        stage = make_stage(model, weights, parallel, rank, tensor=context.groups.tensor, device=device)
        logits = play(stage, device, context.groups)
        delta = np.zeros(1)
        if stage.shard.last and parallel.tp == 1:
            assert all(torch.equal(a, b) for a, b in zip(logits, whole, strict=True)), "a pipeline is one stage to the bit"
        elif stage.shard.last and deterministic:
            expected = shards[parallel.tp][parallel.tp_rank(rank)]
            assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True)), "ordered sums are those of one process"
        elif stage.shard.last:
            span = slice(stage.shard.vocab.start, stage.shard.vocab.stop)
            pairs = zip(logits, whole, strict=True)
            delta[0] = max(float((a[:, : stage.shard.vocab.size] - b[:, span]).abs().max()) for a, b in pairs) / largest
        comm.Allreduce(MPI.IN_PLACE, delta, op=MPI.MAX)
        if not deterministic:
            report[f"tp={parallel.tp} pp={parallel.pp}"] = float(delta[0])
            assert delta[0] <= 1e-4, report
        assert context.nccl is not None
        context.nccl.leave()
    comm.Barrier()
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
