"""One world of tp * pp ranks over a small model: conformance of the groups, exact integer sums, every rank's logits of fixed steps.

Run by ``test_layouts.py`` under mpiexec. Each last-stage rank writes its logits shard; rank 0 writes the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mpi4py import MPI

from tests.mpi.steps import play, write_played
from tests.reference.conformance import conform
from tests.reference.shards import make_stage, whole_weights
from workers.artifacts.artifact import open_artifact
from workers.core.shard import shard_of, whole_tensors
from workers.engine.comm import Group
from workers.engine.mpi import Mpi
from workers.spec import ModelSpec, Parallel


def integer_products_are_exact(model: ModelSpec, parallel: Parallel, rank: int, group: Group) -> None:
    """Column- and row-cut products of small integers, summed over ranks, equal the whole product to the bit."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randint(-3, 4, t.shape, generator=generator).float() for name, t in whole_tensors(model).items()}
    stage = make_stage(model, weights, parallel, rank, tensor=group)
    shard = shard_of(model, parallel, rank)
    hidden = torch.randint(-4, 5, (9, model.hidden_size), generator=generator).float()
    tokens = torch.randint(0, model.vocab_size, (9,), generator=generator)
    if shard.first:
        assert torch.equal(stage.embed(tokens), weights["model.embed_tokens.weight"][tokens])
    for local, number in enumerate(range(shard.layers.start, shard.layers.stop)):
        layer, prefix = stage.layers[local], f"model.layers.{number}."
        for linear, name, span in (
            (layer.dense, "self_attn.o_proj", shard.heads.scaled(model.head_dim)),
            (layer.down, "mlp.down_proj", shard.ffn),
        ):
            whole = weights[f"{prefix}{name}.weight"]
            x = torch.randint(-4, 5, (9, whole.shape[1]), generator=generator).float()
            assert torch.equal(group.all_reduce(linear(x[:, span.start : span.stop].contiguous())), x @ whole.T)
        for name, span in (("q", shard.heads), ("k", shard.kv_heads), ("v", shard.kv_heads)):
            rows = span.scaled(model.head_dim)
            whole = hidden @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
            start = {"q": 0, "k": shard.heads.size, "v": shard.heads.size + shard.kv_heads.size}[name] * model.head_dim
            assert torch.equal(layer.qkv(hidden)[:, start : start + rows.size], whole[:, rows.start : rows.stop])
        both = torch.cat(
            [(hidden @ weights[f"{prefix}mlp.{n}_proj.weight"].T)[:, shard.ffn.start : shard.ffn.stop] for n in ("gate", "up")], 1
        )
        assert torch.equal(layer.gate_up(hidden), both)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    world = MPI.COMM_WORLD
    rank = world.Get_rank()
    parallel = Parallel(tp=arguments["tp"], pp=arguments["pp"])
    torch.set_num_threads(1)
    conform(Mpi(world.Dup()))
    conform(Mpi(world.Dup(), deterministic=True))
    tensor_comm = world.Split(parallel.pp_rank(rank), rank)
    pipeline = Mpi(world.Split(parallel.tp_rank(rank), rank))
    folder = Path(arguments["model"])
    model, weights = open_artifact(folder).model, whole_weights(folder)
    integer_products_are_exact(model, parallel, rank, Mpi(tensor_comm))
    for name, deterministic in (("ordered", True), ("plain", False)):
        group = Mpi(tensor_comm.Dup(), deterministic=deterministic)
        stage = make_stage(model, weights, parallel, rank, tensor=group)
        logits, results = play(stage, tensor=group, pipeline=pipeline)
        if stage.shard.last:
            write_played(Path(f"{arguments['out']}.{name}.{parallel.tp_rank(rank)}"), (logits, results))
    world.Barrier()
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps({"ranks": world.Get_size()}))


if __name__ == "__main__":
    main()
