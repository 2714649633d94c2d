"""How experts are distributed to ranks and counted: cut by columns, or whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from workers.layout.declaration import EXPERTS
from workers.layout.memory import frozen_bytes
from workers.layout.sharding import active_parameters, parameters, shard_tensors, whole_tensors
from workers.protocol.errors import ConfigError
from workers.protocol.specs import (
    PLAIN,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    Parallel,
    PortableSpec,
    RopeSpec,
    SharedExpertSpec,
    model_spec,
)


def mixture(experts: int = 5, *, size: int = 36, dense: int = 0, **facts: int) -> ModelSpec:
    """Three layers, of which the first ``dense`` have no experts."""
    attention = AttentionSpec(rope=RopeSpec(dim=8))
    moe = MoeSpec(experts=experts, experts_per_token=2, size=size, shared=SharedExpertSpec(size=24, gated=True))
    layers = [LayerSpec(attention=attention, mlp=MlpSpec(size=50) if index < dense else moe) for index in range(3)]
    common = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8, "vocab_size": 100, "max_position": 64}
    return model_spec(layers, architecture="qwen2_moe", **common | facts)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2)])
def test_ranks_hold_every_weight_of_every_expert_once(tp: int, pp: int, expert_parallel: bool) -> None:
    model, parallel = mixture(dense=1), Parallel(tp=tp, pp=pp, expert_parallel=expert_parallel)
    held: dict[str, list[tuple[int, int]]] = {}
    for rank in range(parallel.world):
        for tensor in shard_tensors(model, parallel, rank):
            for piece in tensor.pieces:
                if EXPERTS in piece.tensor.name:
                    held.setdefault(piece.tensor.name, []).append((piece.span.start, piece.span.stop))
    for name, whole in whole_tensors(model).items():
        if EXPERTS in name:
            spans = sorted(held[name])
            assert spans[0][0] == 0 and spans[-1][1] == whole.shape[whole.axis]
            assert all(before[1] == after[0] for before, after in pairwise(spans))
            assert len(spans) == (1 if expert_parallel else tp)


def test_uneven_numbers_of_experts_differ_by_one() -> None:
    parallel = Parallel(tp=3, expert_parallel=True)
    counts = [sum(f"layers.0.{EXPERTS}" in each.name for each in shard_tensors(mixture(), parallel, rank)) // 3 for rank in range(3)]
    assert counts == [2, 2, 1]


@pytest.mark.parametrize(
    ("model", "parallel", "named"),
    [
        (mixture(dense=3), Parallel(tp=2, expert_parallel=True), "no experts to be distributed"),
        (mixture(2), Parallel(tp=3, expert_parallel=True), "tp=3 is more than the model's 2 experts"),
        (mixture(size=2), Parallel(tp=3), "can be distributed"),
    ],
)
def test_a_layout_that_leaves_a_rank_without_experts_is_refused(model: ModelSpec, parallel: Parallel, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        shard_tensors(model, parallel, 0)


def test_whole_experts_may_have_fewer_columns_than_there_are_ranks() -> None:
    assert shard_tensors(mixture(size=2), Parallel(tp=3, expert_parallel=True), 2)


def test_a_token_computes_with_the_experts_that_it_takes() -> None:
    model = mixture(dense=1)
    assert parameters(model) == sum(math.prod(tensor.shape) for tensor in whole_tensors(model).values())
    assert parameters(model) - active_parameters(model) == 2 * (5 - 2) * 3 * 36 * 24


def test_what_chooses_experts_takes_fp32() -> None:
    model, engine = mixture(), PortableSpec(dtype="bf16", device="cuda")
    routers = 3 * (5 + 1) * 24
    assert frozen_bytes(model, Parallel(), 0, engine, PLAIN) == 2 * parameters(model) + 2 * routers
