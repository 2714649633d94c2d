"""The placement of a gang's ranks on nodes: one rule for the planner and for the Ray launcher. Pure.

The planner uses the whole result of :func:`place_gang`. The Ray launcher uses only its ``unit`` and ``spread``, as a placement group
(:func:`placement_request`): Ray chooses the nodes, because it knows which are busy.

A tensor-parallel group communicates in every layer, so it stays on one node wherever it fits; pipeline stages communicate once a
micro-batch, so they may be on several nodes. Ranks are assigned in order, stage after stage, so consecutive stages share a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import Parallel

#: Of Ray's placement groups: all bundles on one node; on as few nodes as possible; each on another node.
Strategy = Literal["STRICT_PACK", "PACK", "STRICT_SPREAD"]


class RankAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """``ranks[i]`` consecutive ranks go to node ``nodes[i]``. ``unit``: ranks that must share a node: the gang, a tensor-parallel group, or
    one rank. ``spread``: each unit has a node of its own. ``splits_group``: a tensor-parallel group is on several nodes."""

    nodes: tuple[int, ...]
    ranks: tuple[int, ...]
    unit: int
    spread: bool = False
    splits_group: bool = False

    @property
    def crossings(self) -> int:
        """Hops between consecutive ranks that leave a node."""
        return len(self.nodes) - 1


def place_gang(parallel: Parallel, rooms: Sequence[int], *, spread: bool = False) -> RankAssignment | None:
    """Choose nodes for one gang; ``rooms[i]``: ranks that node i has room for. None where they have no room for all ranks.

    The unit is the largest that fits: the whole gang on one node, else each stage on one node, else each rank. Units fill the fewest
    nodes; the rest goes to the node that it fills best, so large nodes stay free for large gangs. ``spread``: a node of its own for each
    stage, where there are several stages and as many nodes that hold one.
    """
    fitting = sorted((room, node) for node, room in enumerate(rooms) if room >= parallel.tp)[: parallel.pp]
    if spread and 1 < parallel.pp == len(fitting):
        nodes = tuple(sorted(node for _, node in fitting))
        return RankAssignment(nodes=nodes, ranks=(parallel.tp,) * parallel.pp, unit=parallel.tp, spread=True)
    for unit in (parallel.world, parallel.tp, 1):
        if sum(room // unit for room in rooms) >= parallel.world // unit:
            dealt = _fill(rooms, unit, parallel.world // unit)
            return RankAssignment(nodes=tuple(dealt), ranks=tuple(dealt.values()), unit=unit, splits_group=unit < parallel.tp)
    return None


def _fill(rooms: Sequence[int], unit: int, count: int) -> dict[int, int]:
    """Node -> ranks, in rank order, for ``count`` units on nodes that hold as many: the largest nodes first, then the best fit."""
    dealt: dict[int, int] = {}
    free = {node: room // unit for node, room in enumerate(rooms)}
    while count:
        enough = [(rooms[node], node) for node, units in free.items() if units >= count]
        node = min(enough)[1] if enough else max(free, key=lambda each: (free[each], -rooms[each], -each))
        taken = min(free.pop(node), count)
        dealt[node] = taken * unit
        count -= taken
    return dealt


class NodeResources(msgspec.Struct, frozen=True, kw_only=True):
    """The total capacity of one node for gangs: CPU shares and GPUs, free or busy."""

    address: str
    cpus: float
    gpus: float = 0.0


class RankShare(msgspec.Struct, frozen=True, kw_only=True):
    """The resources of one rank."""

    cpus: float = 1.0
    gpus: float = 0.0


class PlacementRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A Ray placement group: ``ranks[i]`` consecutive ranks live in bundle i."""

    ranks: tuple[int, ...]
    share: RankShare
    strategy: Strategy

    def bundles(self) -> list[dict[str, float]]:
        """Ray's form: one resource dict a bundle."""
        rows = [{"CPU": self.share.cpus * count, "GPU": self.share.gpus * count} for count in self.ranks]
        return [{name: amount for name, amount in row.items() if amount > 0} for row in rows]


def capacity(node: NodeResources, share: RankShare) -> int:
    """Ranks that the node holds when it is empty."""
    limits = [int(have / need + 1e-9) for have, need in ((node.cpus, share.cpus), (node.gpus, share.gpus)) if need > 0]
    return min(limits) if limits else 1 << 20


def placement_request(
    name: str, parallel: Parallel, share: RankShare, nodes: Sequence[NodeResources], *, spread: bool = False
) -> PlacementRequest:
    """The placement group for the present cluster, as if it were empty: a gang waits for a busy cluster and is refused by one that is too
    small.

    A bundle is one unit of :func:`place_gang`, not all units of a node: on an empty cluster Ray packs bundles as :func:`place_gang` does,
    and on a busy one single stages find room where a node's worth of them would wait.

    Raises :class:`ConfigError` where not even the empty cluster holds the gang.
    """
    placed = place_gang(parallel, [capacity(node, share) for node in nodes], spread=spread)
    if placed is not None:
        return _request(parallel, placed.unit, share, spread=placed.spread)
    need = " and ".join(
        f"{amount * parallel.world:g} {unit}" for amount, unit in ((share.cpus, "CPU shares"), (share.gpus, "GPUs")) if amount
    )
    have = ", ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes) or "no node"
    raise ConfigError(
        f"replica {name} (tp={parallel.tp}, pp={parallel.pp}) does not fit on the cluster",
        f"it needs {need}; the cluster has {have}",
        "use a smaller --tp-size or --pp-size, or add nodes",
    )


def scale_up_request(parallel: Parallel, share: RankShare, *, spread: bool = False) -> PlacementRequest:
    """The placement group for a cluster that may grow: one bundle per stage, because adding a node that holds no whole tensor-parallel
    group does not help."""
    return _request(parallel, parallel.tp, share, spread=spread and parallel.pp > 1)


def _request(parallel: Parallel, unit: int, share: RankShare, *, spread: bool) -> PlacementRequest:
    count = parallel.world // unit
    strategy: Strategy = "STRICT_SPREAD" if spread else "STRICT_PACK" if count == 1 else "PACK"
    return PlacementRequest(ranks=(unit,) * count, share=share, strategy=strategy)
