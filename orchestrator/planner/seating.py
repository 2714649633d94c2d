"""Nodes, and where the ranks of a gang sit on them before any exists. Pure.

A tensor-parallel group stays within a node, where the fast links are; stages may cross. What a launcher does with real nodes is
:mod:`orchestrator.control.placement`.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from orchestrator.planner.devices import GpuModel, HostModel
from workers.protocol.specs import ModelSpec, Parallel

#: Most stages that are tried for a model.
DEEPEST = 16


class PlannedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` alike, each with ``slots`` GPUs, or CPU shares where ``device`` is a host's."""

    device: GpuModel | HostModel
    nodes: int
    slots: int

    @property
    def what(self) -> str:
        kind = f"{self.slots} x {self.device.name}"
        if isinstance(self.device, HostModel) and self.slots != self.device.cores:
            kind = f"{self.slots} shares of {self.device.cores} x {self.device.name}"
        return kind if self.nodes == 1 else f"{self.nodes} nodes of {kind}"


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gang sits: ``ranks`` of it on each of its nodes, hops between stages that leave a node, and whether a stage itself does."""

    ranks: tuple[int, ...]
    crossings: int
    torn: bool


def rooms(cluster: PlannedCluster, cpus_per_rank: float) -> list[int]:
    """Ranks that each empty node holds: one a GPU, or as many as its CPU shares allow."""
    share = 1.0 if isinstance(cluster.device, GpuModel) else cpus_per_rank
    return [int(cluster.slots / share + 1e-9)] * cluster.nodes


def seat(parallel: Parallel, free: list[int], *, spread: bool = False) -> Seat | None:
    """Seat one gang and take its places from ``free`` [nodes], ranks: on one node if any holds it, else stage by stage, else rank by rank;
    None where there are too few places. ``spread``: a node for each stage, where there are as many."""
    apart = [node for node, room in enumerate(free) if room >= parallel.tp][: parallel.pp]
    if spread and len(apart) == parallel.pp:
        for node in apart:
            free[node] -= parallel.tp
        return Seat(ranks=(parallel.tp,) * parallel.pp, crossings=parallel.pp - 1, torn=False)
    within = [(room, node) for node, room in enumerate(free) if room >= parallel.world]
    if within:
        free[min(within)[1]] -= parallel.world
        return Seat(ranks=(parallel.world,), crossings=0, torn=False)
    torn = sum(room // parallel.tp for room in free) < parallel.pp
    unit, left = (1, parallel.world) if torn else (parallel.tp, parallel.pp)
    if sum(room // unit for room in free) < left:
        return None
    ranks = []
    for node, room in enumerate(free):
        if taken_here := min(room // unit, left) * unit:
            free[node] -= taken_here
            ranks.append(taken_here)
            left -= taken_here // unit
    return Seat(ranks=tuple(ranks), crossings=len(ranks) - 1, torn=torn)


def layouts(most: int, widest: int, model: ModelSpec) -> Iterator[Parallel]:
    """Layouts of at most ``most`` ranks whose tensor-parallel groups have at most ``widest`` and leave none of those over, or are powers of
    two; the smallest first."""
    widths = [tp for tp in range(1, min(widest, most, model.num_heads) + 1) if widest % tp == 0 or tp & (tp - 1) == 0]
    found = [Parallel(tp=tp, pp=pp) for tp in widths for pp in range(1, min(most // tp, model.num_layers, DEEPEST) + 1)]
    yield from sorted(found, key=lambda layout: (layout.world, -layout.tp))
