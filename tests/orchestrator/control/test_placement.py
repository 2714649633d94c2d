"""Ranks that talk most share a node; every rank gets a place; what cannot fit is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.placement import NodeResources, RankShare, place, room, wish
from workers.protocol.errors import ConfigError
from workers.protocol.specs import Parallel

GPU = RankShare(cpus=1, gpus=1)


def nodes(*gpus: int) -> list[NodeResources]:
    return [NodeResources(address=f"10.0.0.{i}", cpus=64, gpus=g) for i, g in enumerate(gpus)]


def test_one_node_when_it_fits() -> None:
    placed = place("r", Parallel(tp=2, pp=2), GPU, nodes(2, 4))
    assert placed.ranks == (4,) and placed.strategy == "STRICT_PACK"
    assert placed.bundles() == [{"CPU": 4.0, "GPU": 4.0}]


def test_stages_spread_before_a_stage_is_cut() -> None:
    placed = place("r", Parallel(tp=4, pp=2), GPU, nodes(4, 4))
    assert placed.ranks == (4, 4) and placed.bundles() == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert place("r", Parallel(tp=4, pp=1), GPU, nodes(2, 2)).ranks == (1, 1, 1, 1)


def test_spread_takes_a_node_a_stage_where_there_are_enough() -> None:
    placed = place("r", Parallel(pp=3), RankShare(), nodes(0, 0, 0), spread=True)
    assert placed.strategy == "STRICT_SPREAD" and placed.ranks == (1, 1, 1)
    assert place("r", Parallel(pp=3), RankShare(), nodes(0, 0), spread=True).strategy == "STRICT_PACK"


def test_too_large_names_both_sides() -> None:
    with pytest.raises(ConfigError) as caught:
        place("big", Parallel(tp=8), GPU, nodes(4, 2))
    assert "big (tp=8, pp=1)" in caught.value.what and "8 GPUs" in caught.value.why and "4 GPU" in caught.value.why


def test_a_growing_cluster_is_asked_for_nodes_that_hold_a_stage() -> None:
    assert wish(Parallel(tp=4, pp=2), GPU).bundles() == [{"CPU": 4.0, "GPU": 4.0}] * 2
    assert wish(Parallel(tp=4, pp=2), GPU).strategy == "PACK"
    assert wish(Parallel(tp=4, pp=2), GPU, spread=True).strategy == "STRICT_SPREAD"
    assert wish(Parallel(tp=2), GPU, spread=True).strategy == "STRICT_PACK"


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("parallel", [Parallel(tp=4), Parallel(tp=4, pp=2)])
def test_a_cluster_that_grew_as_it_was_asked_to_needs_no_other_layout(parallel: Parallel, spread: bool) -> None:
    wanted = wish(parallel, GPU, spread=spread)
    assert place("r", parallel, GPU, nodes(0, *wanted.ranks), spread=spread) == wanted


@given(
    tp=st.integers(1, 8),
    pp=st.integers(1, 6),
    gpus=st.lists(st.integers(0, 8), max_size=6),
    spread=st.booleans(),
)
def test_all_ranks_are_placed_or_the_cluster_is_too_small(tp: int, pp: int, gpus: list[int], spread: bool) -> None:
    have = nodes(*gpus)
    try:
        placed = place("r", Parallel(tp=tp, pp=pp), GPU, have, spread=spread)
    except ConfigError:
        assert sum(room(node, GPU) for node in have) < tp * pp
        return
    assert sum(placed.ranks) == tp * pp
    assert sum(bundle["GPU"] for bundle in placed.bundles()) == tp * pp
    # A tensor-parallel group is cut only when no arrangement of whole groups exists.
    if any(count < tp for count in placed.ranks):
        assert sum(room(node, GPU) // tp for node in have) < pp
    free = sorted((room(node, GPU) for node in have), reverse=True)
    for count in sorted(placed.ranks, reverse=True):
        fitting = [i for i, size in enumerate(free) if size >= count]
        assert fitting, "a bundle fits on no node"
        free[fitting[0]] -= count
