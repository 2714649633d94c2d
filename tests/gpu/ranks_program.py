"""Two ranks with a GPU each: the groups conform, pipelines are one stage to the bit, ordered sums are the same shards in one process.

Run by ``test_ranks.py`` under mpiexec. Every rank computes its references on its own GPU; rank 0 writes the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

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


def main() -> None:
    arguments = json.loads(sys.argv[1])
    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    pin_numerics()
    folder = Path(arguments["model"])
    model, weights = open_artifact(folder).model, whole_weights(folder)

    nccl = World.join(comm, device, one_host=True)
    conform(nccl.group([[0, 1]]), device)
    conform(nccl.group([[0, 1]], deterministic=True), device)
    conform(nccl.group([[0, 1]], symmetric_bytes=TWO_SHOT_BYTES), device)
    nccl.leave()

    def alone(parallel: Parallel, at: int, group: Group) -> list[torch.Tensor]:
        torch.cuda.set_device(device)  # of this thread
        stage = make_stage(model, weights, parallel, at, tensor=group, device=device)
        return play(stage, device, Links(group, Solo(), Solo()))

    whole = alone(Parallel(), 0, Solo())
    shards = in_threads(2, lambda group: alone(Parallel(tp=2), group.rank, group))
    report: dict[str, float] = {}
    for parallel, deterministic in ((Parallel(tp=2), True), (Parallel(tp=2), False), (Parallel(pp=2), False)):
        engine = EngineSpec(device="cuda", deterministic=deterministic)
        ranks = split(ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=engine), comm)
        stage = make_stage(model, weights, parallel, rank, tensor=ranks.tensor, device=device)
        logits = play(stage, device, Links(ranks.tensor, ranks.pipeline, ranks.returns))
        if parallel.pp == 2 and rank == 1:
            assert all(torch.equal(a, b) for a, b in zip(logits, whole, strict=True)), "a pipeline is one stage to the bit"
        if parallel.tp == 2 and deterministic:
            assert all(torch.equal(a, b) for a, b in zip(logits, shards[rank], strict=True)), "ordered sums are those of one process"
        if parallel.tp == 2 and not deterministic:
            span = slice(stage.shard.vocab.start, stage.shard.vocab.stop)
            delta = max(float((a[:, : stage.shard.vocab.size] - b[:, span]).abs().max()) for a, b in zip(logits, whole, strict=True))
            report["delta"] = delta / max(float(b.abs().max()) for b in whole)
            assert report["delta"] <= 1e-4, report
        assert ranks.nccl is not None
        ranks.nccl.leave()
    comm.Barrier()
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
