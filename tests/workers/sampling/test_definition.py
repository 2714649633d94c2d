"""The sampling definition: noise is uniform, Gumbel-distributed and stable; parameters act in the stated order."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tests.reference.logprobs import logprobs_of
from tests.support.examples import examples
from workers.protocol.errors import Rejected
from workers.protocol.messages import SamplingParams
from workers.sampling.definition import (
    check,
    choice_seed,
    choose,
    gumbel,
    has_penalties,
    mix,
    noise_bits,
    noise_keys,
    stop_set,
)

GREEDY = SamplingParams(temperature=0.0)
IDS = np.arange(50_000)


def allow(*ids: int) -> bytes:
    bits = np.zeros(32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def test_noise_is_pinned() -> None:
    """A stream must continue equally on a replica of another release."""
    assert noise_bits(0, 0, [0, 1, 49151]).tolist() == [1725031360, 4002246962, 2051103362]
    assert noise_bits(2**63 - 1, 131071, [0, 1, 49151]).tolist() == [2525838072, 1339602618, 1965224861]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_vector_and_integer_definitions_agree(seed: int, position: int, token: int) -> None:
    k, j = noise_keys(seed, position)
    assert noise_bits(seed, position, [token])[0] == mix(mix((token + k) % 2**32) ^ j)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
@settings(max_examples=examples(25), deadline=None)
def test_noise_is_uniform_and_independent_of_its_neighbours(seed: int, position: int) -> None:
    here = noise_bits(seed, position, IDS)
    counts = np.bincount(here >> 26, minlength=64)
    assert ((counts - IDS.size / 64) ** 2 / (IDS.size / 64)).sum() < 63 + 8 * math.sqrt(2 * 63)
    for other in (noise_bits(seed, position + 1, IDS), noise_bits(choice_seed(seed, 1), position, IDS), np.roll(here, 1)):
        assert abs(np.corrcoef(here, other)[0, 1]) < 6 / math.sqrt(IDS.size)


def test_gumbel_is_finite_and_has_the_right_moments() -> None:
    edges = gumbel(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert edges.dtype == np.float32 and np.isfinite(edges).all() and (np.diff(edges) <= 0).all()
    assert edges[-1] > -2.82 and edges[0] < 22.9
    noise = gumbel(noise_bits(1, 1, np.arange(400_000))).astype(np.float64)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.05


def test_sampling_follows_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    params = SamplingParams(temperature=1.0, seed=7)
    counts = np.bincount([choose(logits, params, [], 0, position) for position in range(4000)], minlength=4)
    assert np.allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.04)


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    draws = {(seed, position): choose(logits, SamplingParams(seed=seed), [], 0, position) for seed in range(8) for position in range(8)}
    assert len(set(draws.values())) > 50
    assert draws == {(s, p): choose(logits, SamplingParams(seed=s), [5] * p, 0, p) for s in range(8) for p in range(8)}


def test_choice_seeds_stay_in_63_bits() -> None:
    assert choice_seed(5, 0) == 5 and choice_seed(2**63 - 1, 1) == 0


def test_greedy_ties_go_to_the_lowest_id() -> None:
    assert choose([1.0, 3.0, 3.0, 2.0], GREEDY, [], 0, 0) == 1


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_not_finite_is_minus_one(bad: list[float]) -> None:
    assert choose(bad, GREEDY, [], 0, 0) == -1


def test_padding_is_never_chosen() -> None:
    assert {choose([-math.inf, 0.0, -math.inf], SamplingParams(temperature=5.0), [], 0, p) for p in range(50)} == {1}


def test_bias_comes_before_penalties() -> None:
    # 1 + 1 = 2, halved = 1 < 1.2; were the bias added after the penalty, 0.5 + 1 would win.
    params = SamplingParams(temperature=0.0, logit_bias={0: 1.0}, repetition_penalty=2.0)
    assert choose([1.0, 1.2], params, [0], 1, 1) == 1


def test_repetition_counts_the_prompt_and_the_others_do_not() -> None:
    repetition = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert choose([2.0, 1.5], repetition, [0], 1, 1) == 1
    assert choose([-1.0, -1.5], repetition, [0], 1, 1) == 1  # a negative logit is multiplied
    presence = SamplingParams(temperature=0.0, presence_penalty=1.0)
    assert choose([2.0, 1.5], presence, [0], 1, 1) == 0
    assert choose([2.0, 1.5], presence, [5, 0], 1, 2) == 1
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.3)
    assert choose([2.0, 1.5], frequency, [5, 0], 1, 2) == 0
    assert choose([2.0, 1.5], frequency, [5, 0, 0], 1, 3) == 1


def test_the_mask_and_min_tokens_forbid() -> None:
    assert choose([3.0, 2.0, 1.0], GREEDY, [], 0, 0, mask=allow(1, 2)) == 1
    early = SamplingParams(temperature=0.0, min_tokens=2)
    assert choose([3.0, 2.0, 1.0], early, [], 4, 5, stops=(0, 999)) == 1
    assert choose([3.0, 2.0, 1.0], early, [], 4, 6, stops=(0, 999)) == 0
    assert choose([3.0, 2.0], GREEDY, [], 0, 0, mask=allow()) == -1


def draws(logits: list[float], **settings: float) -> set[int]:
    return {choose(logits, SamplingParams(**{"temperature": 1.0, **settings}), [], 0, position) for position in range(600)}


def test_top_k_top_p_and_min_p() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert draws(logits) == {0, 1, 2, 3}
    assert draws(logits, top_k=2) == {0, 1}
    assert draws(logits, top_p=0.65) == {0, 1}
    assert draws(logits, top_p=0.0001) == {0}
    assert draws(logits, min_p=0.45) == {0, 1, 2}
    # Top-p acts on what top-k left: of 4/7 and 3/7 the first alone holds 0.55.
    assert draws(logits, top_k=2, top_p=0.55) == {0}
    # Temperature comes first: at 0.5 the shares are 0.53, 0.3, 0.13, 0.03.
    assert draws(logits, temperature=0.5, top_p=0.5) == {0}


def test_ties_at_an_edge_are_all_kept() -> None:
    assert draws([1.0, 1.0, 1.0, 0.0], top_k=2) == {0, 1, 2}
    assert draws([1.0, 1.0, 1.0, 0.0], top_p=0.1) == {0, 1, 2}


def test_stop_set_and_history_need() -> None:
    assert stop_set(SamplingParams(stop_ids=(5,)), (2, 3)) == {2, 3, 5}
    assert stop_set(SamplingParams(stop_ids=(5,), ignore_eos=True), (2, 3)) == {5}
    assert not has_penalties(SamplingParams())
    assert all(has_penalties(SamplingParams(**{name: 0.5})) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"))


def test_logprobs_are_of_the_raw_row() -> None:
    own, ids, scores = logprobs_of(np.log([0.1, 0.4, 0.1, 0.4]), 2, 3)
    assert own == pytest.approx(math.log(0.1)) and ids == [1, 3, 0]
    assert scores == pytest.approx([math.log(0.4), math.log(0.4), math.log(0.1)])


@pytest.mark.parametrize("odd", [{"logprobs": -1}, {"temperature": 1e-40}, {"temperature": float("nan")}, {"logit_bias": {99: 1.0}}])
def test_what_arithmetic_cannot_take_is_refused(odd: dict[str, object]) -> None:
    check(SamplingParams(), vocab_size=99, max_logprobs=20)
    with pytest.raises(Rejected) as caught:
        check(SamplingParams(**odd), vocab_size=99, max_logprobs=20)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(odd))
