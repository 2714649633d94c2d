"""The torch sampler against its numpy definition, and sharded against whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.conformance import in_threads
from tests.reference.logprobs import logprobs_of
from workers.distributed.group import Group, Solo
from workers.protocol.messages import SamplingParams
from workers.runner.sampler import Sampler, SamplingInput, noise
from workers.sampling.definition import allowed_ids, choose, gumbel, noise_bits

VOCAB = 1009  # prime: no shard count divides it


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB)) * scale).astype(np.float32)


def many_params() -> list[SamplingParams]:
    P = SamplingParams  # noqa: N806
    return [
        P(temperature=0.0),
        P(temperature=1.0, seed=7),
        P(temperature=0.7, top_k=5, seed=1),
        P(temperature=1.3, top_k=200, seed=2),
        P(temperature=0.9, top_p=0.8, seed=3),
        P(temperature=5.0, top_p=0.97, seed=4),  # nucleus far wider than what a shard shows
        P(temperature=1.0, min_p=0.05, seed=5),
        P(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=2**62 + 11),
        P(temperature=0.0, repetition_penalty=1.8),
        P(temperature=1.1, presence_penalty=0.9, frequency_penalty=0.4, seed=8),
        P(temperature=0.0, logit_bias={3: 100.0, 900: 99.0}),
        P(temperature=0.0, logit_bias={1008: 100.0}),
        P(temperature=1.0, seed=9, min_tokens=4, stop_ids=(1, 2, 1007)),
        P(temperature=1e-3, top_k=1, seed=10),
        P(temperature=1.0, top_p=1e-6, seed=12),
    ]


HISTORY = [5, 5, 900, 17, 1008, 5, 3, 17]
PROMPT_LEN = 4


def mask_for(row: int) -> bytes | None:
    if row % 5 != 3:
        return None
    bits = np.random.default_rng(row).random(VOCAB) < 0.3
    return np.packbits(bits, bitorder="little").tobytes().ljust(4 * -(-VOCAB // 32), b"\0")


def shard(group: Group, logits: np.ndarray) -> tuple[Sampler, torch.Tensor]:
    rows = -(-VOCAB // group.size)
    start = group.rank * rows
    mine = torch.full((len(logits), rows), -torch.inf)
    part = torch.from_numpy(logits[:, start : start + rows])
    mine[:, : part.shape[1]] = part
    return Sampler(group, start=start, rows=rows, device=torch.device("cpu")), mine


def make_inputs(sampler: Sampler, params: list[SamplingParams], position: int) -> list[SamplingInput]:
    inputs = []
    for row, p in enumerate(params):
        seen = torch.zeros(sampler.rows, dtype=torch.bool)
        counts = torch.zeros(sampler.rows)
        seen[torch.from_numpy(sampler.local_ids(np.array(HISTORY)))] = True
        for token in sampler.local_ids(np.array(HISTORY[PROMPT_LEN:])).tolist():
            counts[token] += 1
        penal = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        packed = mask_for(row)
        mask = None
        if packed is not None:
            mask = torch.zeros(sampler.rows, dtype=torch.bool)
            bits = allowed_ids(packed, VOCAB)[sampler.start : sampler.start + sampler.rows]
            mask[: len(bits)] = torch.from_numpy(bits)
        banned = p.stop_ids if position - PROMPT_LEN < p.min_tokens else ()
        inputs.append(SamplingInput(p, position, banned, seen if penal else None, counts if penal else None, mask))
    return inputs


def oracle(logits: np.ndarray, params: list[SamplingParams], position: int) -> list[int]:
    return [
        choose(line, p, HISTORY, PROMPT_LEN, position, stops=p.stop_ids, mask=mask_for(row))
        for row, (line, p) in enumerate(zip(logits, params, strict=True))
    ]


def drawn(group: Group, logits: np.ndarray, params: list[SamplingParams], position: int) -> list[int]:
    sampler, mine = shard(group, logits)
    return sampler.sample(mine, make_inputs(sampler, params, position)).tokens.tolist()


def test_noise_is_the_defined_one() -> None:
    ids = np.arange(VOCAB)
    params = [SamplingParams(seed=s) for s in (0, 1, 2**32 - 1, 2**63 - 1, 123456789012345)]
    found = noise([SamplingInput(p, 2**20 + i) for i, p in enumerate(params)], torch.arange(VOCAB, dtype=torch.int32)).numpy()
    for i, p in enumerate(params):
        np.testing.assert_allclose(found[i], gumbel(noise_bits(p.seed, 2**20 + i, ids)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_shard_count_draws_what_the_definition_says(size: int) -> None:
    params = many_params()
    for position in range(8, 20):
        logits = random_logits(len(params), seed=position)
        expected = oracle(logits, params, position)
        for found in in_threads(size, lambda group: drawn(group, logits, params, position)):  # noqa: B023
            assert found == expected


@pytest.mark.parametrize("size", [1, 2, 7])
def test_ties_go_to_the_lowest_id_and_are_kept_together(size: int) -> None:
    logits = np.round(random_logits(15, seed=3)).astype(np.float32)  # many equal values
    params = many_params()
    expected = oracle(logits, params, 9)
    assert all(found == expected for found in in_threads(size, lambda group: drawn(group, logits, params, 9)))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("greedy", [True, False])
def test_only_the_broken_row_is_refused(size: int, greedy: bool) -> None:
    logits = random_logits(4, seed=1)
    logits[1, 700] = np.nan
    logits[2, 3] = np.inf
    params = [SamplingParams(temperature=0.0 if greedy else 1.0, seed=i, top_p=0.9 if i == 3 and not greedy else 1.0) for i in range(4)]
    for found in in_threads(size, lambda group: drawn(group, logits, params, 30)):
        assert found[1] == found[2] == -1
        assert [found[0], found[3]] == [choose(logits[i], params[i], (), 0, 30) for i in (0, 3)]


def test_a_mask_that_allows_nothing_is_refused() -> None:
    sampler, mine = shard(Solo(), random_logits(1))
    assert sampler.sample(
        mine, [SamplingInput(SamplingParams(temperature=0.0), 3, mask=torch.zeros(VOCAB, dtype=torch.bool))]
    ).tokens.tolist() == [-1]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_logprobs_are_of_the_raw_distribution(size: int) -> None:
    logits = np.round(random_logits(6, seed=5) * 4) / 4  # ties among the best
    params = [SamplingParams(temperature=1.5, seed=i, logprobs=5, top_k=3, logit_bias={4: 2.0}) for i in range(6)]

    def member(group: Group) -> tuple:
        sampler, mine = shard(group, logits)
        result = sampler.sample(mine, make_inputs(sampler, params, 40))
        ids, values = sampler.top_logits(mine, 5)
        return result, ids, values - sampler.log_normalizer(mine).unsqueeze(1), sampler.logits_of(mine, torch.arange(6) * 100)

    for result, ids, values, raw in in_threads(size, member):
        for row in range(6):
            own, best, scores = logprobs_of(logits[row], int(result.tokens[row]), 5)
            assert abs(result.logprobs[row] - own) < 1e-5
            assert ids[row].tolist() == best
            np.testing.assert_allclose(values[row], scores, atol=1e-9)
            assert raw[row] == logits[row, row * 100]


def test_inputs_are_left_as_they_were() -> None:
    params = many_params()
    sampler, mine = shard(Solo(), random_logits(len(params)))
    before = mine.clone()
    sampler.sample(mine, make_inputs(sampler, params, 9))
    assert torch.equal(mine, before)
