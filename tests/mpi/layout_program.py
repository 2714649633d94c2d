"""Layouts of a small model, one after the other: conformance of the groups, exact integer sums, every rank's logits of fixed steps.

Run by ``test_layouts.py`` under mpiexec, with as many ranks as the largest layout has; a layout takes the first of them. Each last-stage
rank writes its logits shard; rank 0 says which layouts are through, and writes the report.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI

from tests.mpi.steps import play, write_played
from tests.reference.conformance import conform
from tests.reference.shards import make_stage, whole_weights
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Group
from workers.distributed.mpi_group import MpiGroup
from workers.layout.sharding import shard_of, whole_tensors
from workers.protocol.specs import ModelSpec, Parallel


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
            (layer.attention.dense, "self_attn.o_proj", shard.heads.scaled(model.head_dim)),
            (layer.mlp.down, "mlp.down_proj", shard.columns(model.widest_mlp)),
        ):
            whole = weights[f"{prefix}{name}.weight"]
            x = torch.randint(-4, 5, (9, whole.shape[1]), generator=generator).float()
            assert torch.equal(group.all_reduce(linear(x[:, span.start : span.stop].contiguous())), x @ whole.T)
        for name, span in (("q", shard.heads), ("k", shard.kv_heads), ("v", shard.kv_heads)):
            rows = span.scaled(model.head_dim)
            whole = hidden @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
            start = {"q": 0, "k": shard.heads.size, "v": shard.heads.size + shard.kv_heads.size}[name] * model.head_dim
            assert torch.equal(layer.attention.qkv(hidden)[:, start : start + rows.size], whole[:, rows.start : rows.stop])
        both = torch.cat(
            [
                (hidden @ weights[f"{prefix}mlp.{n}_proj.weight"].T)[
                    :, shard.columns(model.widest_mlp).start : shard.columns(model.widest_mlp).stop
                ]
                for n in ("gate", "up")
            ],
            1,
        )
        assert torch.equal(layer.mlp.gate_up(hidden), both)


def patiently(comm: MPI.Intracomm) -> None:
    """A barrier whose waiters sleep: there are more ranks than cores, and those that compute need them."""
    everyone = comm.Ibarrier()
    while not everyone.Test():
        time.sleep(0.005)


def layout(parallel: Parallel, comm: MPI.Intracomm, folder: Path, out: str) -> None:
    """``comm``: the layout's ranks, and nobody else."""
    rank = comm.Get_rank()
    conform(MpiGroup(comm.Dup()))
    conform(MpiGroup(comm.Dup(), deterministic=True))
    tensor_comm = comm.Split(parallel.pp_rank(rank), rank)
    pipeline = MpiGroup(comm.Split(parallel.tp_rank(rank), rank))
    model, weights = open_artifact(folder).model, whole_weights(folder)
    integer_products_are_exact(model, parallel, rank, MpiGroup(tensor_comm))
    for name, deterministic in (("ordered", True), ("plain", False)):
        group = MpiGroup(tensor_comm.Dup(), deterministic=deterministic)
        stage = make_stage(model, weights, parallel, rank, tensor=group)
        logits, results = play(stage, tensor=group, pipeline=pipeline)
        if stage.shard.last:
            write_played(Path(f"{out}.{name}.{parallel.tp_rank(rank)}"), (logits, results))
    patiently(comm)  # what was sent last is read from its sender's memory


def main() -> None:
    arguments = json.loads(sys.argv[1])
    world = MPI.COMM_WORLD
    torch.set_num_threads(1)
    layouts = [Parallel(tp=tp, pp=pp) for tp, pp in arguments["layouts"]]
    comms = [world.Split(0 if world.Get_rank() < each.world else MPI.UNDEFINED) for each in layouts]
    for parallel, comm in zip(layouts, comms, strict=True):
        if comm != MPI.COMM_NULL:
            layout(parallel, comm, Path(arguments["model"]), f"{arguments['out']}.{parallel.tp}x{parallel.pp}")
        patiently(world)
        if world.Get_rank() == 0:
            print(f"tp={parallel.tp} pp={parallel.pp} is played", flush=True)
    if world.Get_rank() == 0:
        Path(arguments["report"]).write_text(json.dumps({"ranks": world.Get_size()}))


if __name__ == "__main__":
    main()
