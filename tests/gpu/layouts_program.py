"""Ranks with a GPU each: the groups conform, pipelines are one stage to the bit, ordered sums are the same shards in one process.

Run under mpiexec by ``test_ranks.py`` and ``bench.many_gpus`` with the ``layouts`` that the world's ranks can form. Every rank computes its
references on its own GPU; rank 0 writes the report: the largest relative difference of plain sums, by layout.
"""

from __future__ import annotations

import json
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
from workers.engine.cache import KvCache
from workers.engine.comm import Group, Solo
from workers.engine.device import CudaDevice, pin_numerics
from workers.engine.device_runner import DeviceRunner, Links
from workers.engine.groups import split
from workers.engine.nccl import TWO_SHOT_BYTES, World
from workers.model.kernels import choose
from workers.model.llama import LlamaStage
from workers.spec import EngineSpec, Parallel, ReplicaSpec


class Plain(CudaDevice):
    """Nothing captured: threads of one process cannot capture at the same time."""

    def capture(self, program: Callable[[], None]) -> Callable[[], None]:
        return program


def play(stage: LlamaStage, device: torch.device, links: Links) -> list[torch.Tensor]:
    """Logits of every step of :func:`tests.mpi.steps.plans`, whose rows all take the way on which logits can be seen."""
    seen: list[torch.Tensor] = []
    if stage.shard.last:
        plain = stage.logits

        def recording(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(plain(hidden))
            return seen[-1].clone()

        stage.logits = recording  # type: ignore[method-assign]
    cache = KvCache(stage.model, stage.shard, blocks=64, block_size=16, dtype=stage.dtype, device=device)
    runner = DeviceRunner(
        stage, cache, Plain(device), choose, links, slots=4, max_seq_len=512, max_num_tokens=256, depth=links.pipeline.size + 1
    )
    for plan in plans():
        answer = runner.issue(plan)
        if answer is not None:
            answer.result()
    torch.cuda.synchronize()
    return seen


def _shard(alone: Callable[[Parallel, int, Group], list[torch.Tensor]], tp: int, group: Group) -> list[torch.Tensor]:
    return alone(Parallel(tp=tp), group.rank, group)


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
    nccl = World.join(comm, device, one_host=True)
    conform(nccl.group(everyone), device)
    conform(nccl.group(everyone, deterministic=True), device)
    conform(nccl.group(everyone, symmetric_bytes=TWO_SHOT_BYTES), device)
    nccl.leave()

    def alone(parallel: Parallel, at: int, group: Group) -> list[torch.Tensor]:
        torch.cuda.set_device(device)  # of this thread
        stage = make_stage(model, weights, parallel, at, tensor=group, device=device)
        return play(stage, device, Links(group, Solo(), Solo()))

    whole = alone(Parallel(), 0, Solo())
    largest = max(float(logits.abs().max()) for logits in whole)
    layouts = [Parallel(tp=tp, pp=pp) for tp, pp in arguments["layouts"]]
    shards = {tp: in_threads(tp, partial(_shard, alone, tp)) for tp in {parallel.tp for parallel in layouts} - {1}}
    report: dict[str, float] = {}
    for parallel, deterministic in product(layouts, (True, False)):
        if deterministic and parallel.tp == 1:
            continue
        engine = EngineSpec(device="cuda", deterministic=deterministic)
        ranks = split(ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=engine), comm)
        stage = make_stage(model, weights, parallel, rank, tensor=ranks.tensor, device=device)
        logits = play(stage, device, Links(ranks.tensor, ranks.pipeline, ranks.returns))
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
        assert ranks.nccl is not None
        ranks.nccl.leave()
    comm.Barrier()
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
