"""Which slice of every tensor a rank holds: every part of the model is somewhere, and nothing is where it should not be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from workers.layout.declaration import EMBEDDING, HEAD
from workers.layout.sharding import (
    Span,
    deal,
    heads_of,
    parameters,
    shard_of,
    shard_tensors,
    shares_embedding,
    trtllm_refusal,
    whole_tensors,
)
from workers.protocol.errors import ConfigError
from workers.protocol.specs import ModelSpec, Parallel, uniform_decoder


def model(**changes: object) -> ModelSpec:
    shape: dict[str, object] = {
        "architecture": "llama", "hidden_size": 24, "intermediate_size": 40, "num_layers": 5, "num_heads": 6, "num_kv_heads": 3,
        "head_dim": 4, "vocab_size": 50, "max_position": 64, "tied_embeddings": True,
    }  # fmt: skip
    return uniform_decoder(**(shape | changes))  # type: ignore[arg-type]


SMOLLM2 = model(
    hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152, max_position=8192
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelSpec, Parallel]:
    kv, group = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    spec = model(
        num_heads=kv * group,
        num_kv_heads=kv,
        num_layers=draw(st.integers(1, 7)),
        intermediate_size=draw(st.integers(30, 70)),
        vocab_size=draw(st.integers(30, 70)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head"])),
    )
    return spec, Parallel(tp=draw(st.integers(1, kv * group)), pp=draw(st.integers(1, spec.num_layers)))


@given(st.integers(0, 200), st.integers(1, 40))
def test_deal_covers_everything_once_and_evenly(total: int, parts: int) -> None:
    spans = [deal(total, parts, index) for index in range(parts)]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(total))
    sizes = [span.size for span in spans]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(layouts())
def test_heads_are_covered_once_beside_their_kv_head(layout: tuple[ModelSpec, Parallel]) -> None:
    spec, parallel = layout
    group = spec.num_heads // spec.num_kv_heads
    split = [heads_of(spec, parallel.tp, rank) for rank in range(parallel.tp)]
    assert [head for heads, _ in split for head in range(heads.start, heads.stop)] == list(range(spec.num_heads))
    assert {head for _, kv in split for head in range(kv.start, kv.stop)} == set(range(spec.num_kv_heads))
    for heads, kv in split:
        assert heads.size > 0
        assert {head // group for head in range(heads.start, heads.stop)} == set(range(kv.start, kv.stop))
        # The attention kernels map local query heads to local key/value heads by one division.
        assert heads.size % kv.size == 0
    if parallel.tp <= spec.num_kv_heads:
        assert sum(kv.size for _, kv in split) == spec.num_kv_heads
        assert max(kv.size for _, kv in split) - min(kv.size for _, kv in split) <= 1
    else:
        assert all(kv.size == 1 for _, kv in split)


@settings(max_examples=examples(60), deadline=None)
@given(layouts())
def test_every_element_is_stored_as_often_as_the_rules_say(layout: tuple[ModelSpec, Parallel]) -> None:
    spec, parallel = layout
    counts = {name: np.zeros(tensor.shape[tensor.axis], int) for name, tensor in whole_tensors(spec).items()}
    for rank in range(parallel.world):
        for stored in shard_tensors(spec, parallel, rank):
            for piece, place in stored.places():
                assert place.stop <= stored.shape[piece.tensor.axis]
                counts[piece.tensor.name][piece.span.start : piece.span.stop] += 1
    replicated = ("norm.weight", "layernorm.weight")
    for name, count in counts.items():
        if name.endswith(replicated):
            assert (count == parallel.tp).all(), name
        elif ".k_proj" in name or ".v_proj" in name:
            assert count.min() >= 1 and (parallel.tp > spec.num_kv_heads or count.max() == 1), name
        else:
            copies = 2 if name == EMBEDDING and spec.tied_embeddings and parallel.pp > 1 else 1
            assert (count == copies).all(), name


@settings(max_examples=examples(60), deadline=None)
@given(layouts())
def test_names_restart_in_each_stage_and_shapes_match_the_shard(layout: tuple[ModelSpec, Parallel]) -> None:
    spec, parallel = layout
    for rank in range(parallel.world):
        shard = shard_of(spec, parallel, rank)
        tensors = {tensor.name: tensor for tensor in shard_tensors(spec, parallel, rank)}
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.layers.")}
        assert layers == set(range(shard.layers.size))
        assert ("transformer.vocab_embedding.weight" in tensors) == shard.first
        assert ("transformer.ln_f.weight" in tensors) == shard.last
        assert ("lm_head.weight" in tensors) == (shard.last and not shares_embedding(spec, parallel))
        rows = (shard.heads.size + 2 * shard.kv_heads.size) * spec.head_dim
        assert tensors["transformer.layers.0.attention.qkv.weight"].shape == (rows, spec.hidden_size)
        assert tensors["transformer.layers.0.mlp.proj.weight"].shape == (spec.hidden_size, shard.columns(spec.kinds[0].mlp.size).size)
        assert shard.vocab.size <= shard.vocab_rows == -(-spec.vocab_size // parallel.tp)


def test_the_default_model_splits_as_documented() -> None:
    assert [heads_of(SMOLLM2, 2, rank) for rank in range(2)] == [(Span(0, 6), Span(0, 2)), (Span(6, 9), Span(2, 3))]
    assert [heads_of(SMOLLM2, 4, rank) for rank in range(4)] == [
        (Span(0, 2), Span(0, 1)),
        (Span(2, 3), Span(0, 1)),
        (Span(3, 6), Span(1, 2)),
        (Span(6, 9), Span(2, 3)),
    ]
    assert parameters(SMOLLM2) == 134_515_008
    assert sum(tensor.elements for tensor in shard_tensors(SMOLLM2, Parallel(), 0)) == 134_515_008


def test_first_stages_take_the_layers_left_over() -> None:
    parallel = Parallel(pp=3)
    assert [shard_of(model(), parallel, rank).layers for rank in range(3)] == [Span(0, 2), Span(2, 4), Span(4, 5)]


def test_trtllm_names_of_the_two_ffn_projections() -> None:
    tensors = {tensor.name: tensor.pieces[0].tensor.name for tensor in shard_tensors(model(), Parallel(pp=2), 1)}
    # Stage 1 of 3 + 2 layers: its layer 0 is the model's layer 3.
    assert tensors["transformer.layers.0.mlp.fc.weight"] == "model.layers.3.mlp.gate_proj.weight"
    assert tensors["transformer.layers.0.mlp.gate.weight"] == "model.layers.3.mlp.up_proj.weight"
    assert tensors["lm_head.weight"] == EMBEDDING


def test_a_head_of_its_own_for_trtllm() -> None:
    assert HEAD not in {tensor.name for tensor in shard_tensors(model(), Parallel(), 0)}
    assert HEAD in {tensor.name for tensor in shard_tensors(model(), Parallel(), 0, own_head=True)}


@pytest.mark.parametrize("parallel", [Parallel(tp=7), Parallel(pp=6)])
def test_impossible_layouts_are_refused(parallel: Parallel) -> None:
    with pytest.raises(ConfigError):
        shard_of(model(), parallel, 0)


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 2 is outside a world of 2"):
        shard_of(model(), Parallel(tp=2), 2)


def test_trtllm_refuses_uneven_heads_only() -> None:
    refusal = trtllm_refusal(SMOLLM2, Parallel(tp=2))
    assert refusal == ("TensorRT-LLM needs tp to divide 3 KV heads, got tp=2", "use --tp-size 1 or 3, or the portable engine")
    assert trtllm_refusal(SMOLLM2, Parallel(tp=3, pp=7)) is None
    # Copied key/value heads are fine with it, where each gets equally many ranks.
    assert trtllm_refusal(model(num_heads=8, num_kv_heads=2), Parallel(tp=4)) is None
    assert trtllm_refusal(model(num_heads=12, num_kv_heads=2), Parallel(tp=8)) is not None
