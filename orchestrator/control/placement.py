"""Nodes' resources + one replica -> placement-group bundles. Pure.

A tensor-parallel group talks at every layer, so it stays on one node wherever it fits; pipeline stages talk once a micro-batch, so they may
spread. One bundle holds the ranks that must share a node; ranks are dealt to bundles in order, stage after stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import Parallel

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


class NodeResources(msgspec.Struct, frozen=True, kw_only=True):
    """What one node could ever give to gangs: CPU shares and GPUs, whether they are free now or not."""

    address: str
    cpus: float
    gpus: float = 0.0


class RankShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank takes."""

    cpus: float = 1.0
    gpus: float = 0.0


class BundlePlacement(msgspec.Struct, frozen=True, kw_only=True):
    """``ranks[i]`` consecutive ranks live in bundle i."""

    ranks: tuple[int, ...]
    share: RankShare
    strategy: Strategy

    def bundles(self) -> list[dict[str, float]]:
        """Ray's form: one resource dict a bundle."""
        rows = [{"CPU": self.share.cpus * count, "GPU": self.share.gpus * count} for count in self.ranks]
        return [{name: amount for name, amount in row.items() if amount > 0} for row in rows]


def room(node: NodeResources, share: RankShare) -> int:
    """Ranks that the whole node holds."""
    limits = [int(have / need + 1e-9) for have, need in ((node.cpus, share.cpus), (node.gpus, share.gpus)) if need > 0]
    return min(limits) if limits else 1 << 20


def wish(parallel: Parallel, share: RankShare, *, spread: bool = False) -> BundlePlacement:
    """What to ask of a cluster that may grow: a bundle a stage, because a node that holds no tensor-parallel group is not worth adding."""
    strategy: Strategy = "STRICT_PACK" if parallel.pp == 1 else "STRICT_SPREAD" if spread else "PACK"
    return BundlePlacement(ranks=(parallel.tp,) * parallel.pp, share=share, strategy=strategy)


def place(name: str, parallel: Parallel, share: RankShare, nodes: Sequence[NodeResources], *, spread: bool = False) -> BundlePlacement:
    """Bundles for one replica, judged against what the nodes hold when empty: a busy cluster is waited for, a too small one refused.

    In order of preference: the whole gang on one node, one bundle a stage, one bundle a rank. ``spread`` asks for a
    node of its own for each stage.

    Raises:
        ConfigError: not even the empty cluster holds it.
    """
    rooms = sorted((room(node, share) for node in nodes), reverse=True)
    largest = rooms[0] if rooms else 0
    if spread and parallel.pp > 1 and sum(1 for size in rooms if size >= parallel.tp) >= parallel.pp:
        return BundlePlacement(ranks=(parallel.tp,) * parallel.pp, share=share, strategy="STRICT_SPREAD")
    if largest >= parallel.world:
        return BundlePlacement(ranks=(parallel.world,), share=share, strategy="STRICT_PACK")
    if sum(size // parallel.tp for size in rooms) >= parallel.pp:
        return BundlePlacement(ranks=(parallel.tp,) * parallel.pp, share=share, strategy="PACK")
    if sum(rooms) >= parallel.world:
        return BundlePlacement(ranks=(1,) * parallel.world, share=share, strategy="PACK")
    need = " and ".join(
        f"{amount * parallel.world:g} {unit}" for amount, unit in ((share.cpus, "CPU shares"), (share.gpus, "GPUs")) if amount
    )
    have = ", ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes) or "no node"
    raise ConfigError(
        f"replica {name} (tp={parallel.tp}, pp={parallel.pp}) does not fit on the cluster",
        f"it needs {need}; the cluster has {have}",
        "use a smaller --tp-size or --pp-size, or add nodes",
    )
