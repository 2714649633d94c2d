"""Ranks that talk most share a node; every rank gets a place; what cannot fit is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.cluster import take_place
from orchestrator.planner.placement import (
    NodeResources,
    RankAssignment,
    RankShare,
    capacity,
    place_gang,
    placement_request,
    scale_up_request,
)
from workers.protocol.errors import ConfigError
from workers.protocol.specs import Parallel

GPU = RankShare(cpus=1, gpus=1)


def nodes(*gpus: int) -> list[NodeResources]:
    return [NodeResources(address=f"10.0.0.{i}", cpus=64, gpus=g) for i, g in enumerate(gpus)]


def test_one_node_when_it_fits() -> None:
    placed = placement_request("r", Parallel(tp=2, pp=2), GPU, nodes(2, 4))
    assert placed.ranks == (4,) and placed.strategy == "STRICT_PACK"
    assert placed.bundles() == [{"CPU": 4.0, "GPU": 4.0}]


def test_stages_spread_before_a_stage_is_cut() -> None:
    placed = placement_request("r", Parallel(tp=4, pp=2), GPU, nodes(4, 4))
    assert placed.ranks == (4, 4) and placed.bundles() == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert placement_request("r", Parallel(tp=4, pp=1), GPU, nodes(2, 2)).ranks == (1, 1, 1, 1)


def test_spread_takes_a_node_a_stage_where_there_are_enough() -> None:
    placed = placement_request("r", Parallel(pp=3), RankShare(), nodes(0, 0, 0), spread=True)
    assert placed.strategy == "STRICT_SPREAD" and placed.ranks == (1, 1, 1)
    assert placement_request("r", Parallel(pp=3), RankShare(), nodes(0, 0), spread=True).strategy == "STRICT_PACK"


def test_too_large_names_both_sides() -> None:
    with pytest.raises(ConfigError) as caught:
        placement_request("big", Parallel(tp=8), GPU, nodes(4, 2))
    assert "big (tp=8, pp=1)" in caught.value.what and "8 GPUs" in caught.value.why and "4 GPU" in caught.value.why


def test_a_growing_cluster_is_asked_for_nodes_that_hold_a_stage() -> None:
    assert scale_up_request(Parallel(tp=4, pp=2), GPU).bundles() == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert scale_up_request(Parallel(tp=4, pp=2), GPU).strategy == "PACK"
    assert scale_up_request(Parallel(tp=4, pp=2), GPU, spread=True).strategy == "STRICT_SPREAD"
    assert scale_up_request(Parallel(tp=2), GPU, spread=True).strategy == "STRICT_PACK"


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("parallel", [Parallel(tp=4), Parallel(tp=4, pp=2)])
def test_a_cluster_that_grew_as_it_was_asked_to_needs_no_other_layout(parallel: Parallel, spread: bool) -> None:
    wanted = scale_up_request(parallel, GPU, spread=spread)
    assert placement_request("r", parallel, GPU, nodes(0, *wanted.ranks), spread=spread) == wanted


@given(
    tp=st.integers(1, 8),
    pp=st.integers(1, 6),
    gpus=st.lists(st.integers(0, 8), max_size=6),
    spread=st.booleans(),
)
def test_all_ranks_are_placed_or_the_cluster_is_too_small(tp: int, pp: int, gpus: list[int], spread: bool) -> None:
    have = nodes(*gpus)
    try:
        placed = placement_request("r", Parallel(tp=tp, pp=pp), GPU, have, spread=spread)
    except ConfigError:
        assert sum(capacity(node, GPU) for node in have) < tp * pp
        return
    assert sum(placed.ranks) == tp * pp
    assert sum(bundle["GPU"] for bundle in placed.bundles()) == tp * pp
    # A tensor-parallel group is cut only when no arrangement of whole groups exists.
    if any(count < tp for count in placed.ranks):
        assert sum(capacity(node, GPU) // tp for node in have) < pp
    free = sorted((capacity(node, GPU) for node in have), reverse=True)
    for count in sorted(placed.ranks, reverse=True):
        fitting = [i for i, size in enumerate(free) if size >= count]
        assert fitting, "a bundle fits on no node"
        free[fitting[0]] -= count


def test_whole_stages_fill_the_fewest_nodes() -> None:
    assert place_gang(Parallel(tp=2, pp=4), [5, 5]) == RankAssignment(nodes=(0, 1), ranks=(4, 4), unit=2)
    # Ray gets a bundle a stage, and packs two of them on each node.
    assert placement_request("r", Parallel(tp=2, pp=4), GPU, nodes(5, 5)).ranks == (2, 2, 2, 2)
    assert place_gang(Parallel(tp=2, pp=5), [2, 8, 8, 3]) == RankAssignment(nodes=(1, 0), ranks=(8, 2), unit=2)


def test_spread_means_nothing_for_a_single_stage() -> None:
    assert place_gang(Parallel(tp=2), [8, 2], spread=True) == RankAssignment(nodes=(1,), ranks=(2,), unit=2)
    assert placement_request("r", Parallel(tp=2), GPU, nodes(8, 2), spread=True).strategy == "STRICT_PACK"


def packed(bundles: tuple[int, ...], rooms: list[int], *, spread: bool) -> list[int]:
    """Ranks on each node that is used, where Ray packs equal bundles on an empty cluster: the node with the most room first."""
    free, left, found = sorted(rooms, reverse=True), len(bundles), []
    while left:
        taken = 1 if spread else min(free.pop(0) // bundles[0], left)
        found.append(taken * bundles[0])
        left -= taken
    return found


@given(
    tp=st.integers(1, 8),
    pp=st.integers(1, 6),
    rooms=st.lists(st.integers(0, 12), max_size=6),
    spread=st.booleans(),
)
def test_the_planner_and_the_launcher_agree(tp: int, pp: int, rooms: list[int], spread: bool) -> None:
    parallel = Parallel(tp=tp, pp=pp)
    free = list(rooms)
    planned = take_place(parallel, free, spread=spread)
    try:
        asked = placement_request("r", parallel, RankShare(), [NodeResources(address="n", cpus=room) for room in rooms], spread=spread)
    except ConfigError:
        assert planned is None and free == rooms
        return
    assert planned is not None and set(asked.ranks) == {planned.unit}
    assert list(planned.ranks) == packed(asked.ranks, rooms, spread=asked.strategy == "STRICT_SPREAD")
    assert len(set(planned.nodes)) == len(planned.nodes) and all(left >= 0 for left in free)
    assert sum(rooms) - sum(free) == parallel.world
    assert planned.splits_group == (sum(room // tp for room in rooms) < pp)
