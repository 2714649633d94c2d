"""The cluster of a plan: its nodes, their room, and the layouts to try on it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from orchestrator.planner.devices import GpuModel, HostModel
from orchestrator.planner.placement import RankAssignment, place_gang
from workers.protocol.specs import ModelSpec, Parallel

#: Most stages that are tried for a model.
DEEPEST = 16


class PlannedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` equal nodes, each with ``slots`` GPUs, or CPU shares if ``device`` is a host's."""

    device: GpuModel | HostModel
    nodes: int
    slots: int

    @property
    def what(self) -> str:
        kind = f"{self.slots} x {self.device.name}"
        if isinstance(self.device, HostModel) and self.slots != self.device.cores:
            kind = f"{self.slots} shares of {self.device.cores} x {self.device.name}"
        return kind if self.nodes == 1 else f"{self.nodes} nodes of {kind}"


def rooms(cluster: PlannedCluster, cpus_per_rank: float) -> list[int]:
    """Ranks that each empty node holds: one a GPU, or as many as its CPU shares allow."""
    share = 1.0 if isinstance(cluster.device, GpuModel) else cpus_per_rank
    return [int(cluster.slots / share + 1e-9)] * cluster.nodes


def take_place(parallel: Parallel, free: list[int], *, spread: bool = False) -> RankAssignment | None:
    """Place one gang and take its room from ``free`` [nodes], ranks; None where there is too little, and then nothing is taken."""
    placed = place_gang(parallel, free, spread=spread)
    if placed is not None:
        for node, ranks in zip(placed.nodes, placed.ranks, strict=True):
            free[node] -= ranks
    return placed


def layouts(most: int, widest: int, model: ModelSpec, *, expert_parallel: bool = False) -> Iterator[Parallel]:
    """Layouts of at most ``most`` ranks, the smallest first. tp is at most ``widest`` and divides it, or is a power of two.
    ``expert_parallel``: all with whole experts on their ranks."""
    experts = [moe.experts for moe in model.moes if expert_parallel]
    widths = [tp for tp in range(1, min(widest, most, model.num_heads, *experts) + 1) if widest % tp == 0 or tp & (tp - 1) == 0]
    found = [
        Parallel(tp=tp, pp=pp, expert_parallel=expert_parallel)
        for tp in widths
        for pp in range(1, min(most // tp, model.num_layers, DEEPEST) + 1)
    ]
    yield from sorted(found, key=lambda layout: (layout.world, -layout.tp))
