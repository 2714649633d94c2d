"""Step plans on one rank and on pipelines of threads: what a rank remembers, what it answers, and what must not leak between sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.conformance import in_threads
from tests.reference.logprobs import logprobs_of
from tests.reference.shards import make_runner, make_stage, random_weights, whole_weights
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Group
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import Parallel, uniform_decoder
from workers.runner.cpu_runner import CpuRunner
from workers.sampling.definition import choose
from workers.scheduler.step_plan import OpenSlot, StepPlan, StepResult, column, view, view_floats

GREEDY = SamplingParams(temperature=0.0, logprobs=2)
MODEL = uniform_decoder(
    architecture="qwen3",
    hidden_size=40,
    intermediate_size=50,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    max_position=256,
    tied_embeddings=False,
    qk_norm="head",
    qkv_bias=True,
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(MODEL)


@pytest.fixture(scope="module")
def runner(weights: dict[str, torch.Tensor]) -> CpuRunner:
    return make_runner(make_stage(MODEL, weights, positions=256), max_seq_len=256)


def plan(step: int, *sequences: dict, closed: list[int] | None = None) -> StepPlan:
    """``sequences``: slot, start, tokens, and optionally sample, score, blocks, params, history, prompt_len."""
    return StepPlan(
        step=step,
        slots=column([r["slot"] for r in sequences]),
        starts=column([r.get("start", 0) for r in sequences]),
        lengths=column([len(r["tokens"]) for r in sequences]),
        tokens=column([t for r in sequences for t in r["tokens"]]),
        sample=column([r.get("sample", 1) for r in sequences]),
        score=column([r.get("score", 0) for r in sequences]),
        block_slots=column([r["slot"] for r in sequences for _ in r.get("blocks", [])]),
        block_ids=column([b for r in sequences for b in r.get("blocks", [])]),
        closed=column(closed or []),
        opened=[
            OpenSlot(r["slot"], r["params"], r.get("prompt_len", len(r["tokens"])), column(r.get("history", [])))
            for r in sequences
            if "params" in r
        ],
    )


def answer(result: StepResult | None) -> tuple[list[int], list[float]]:
    assert result is not None
    return view(result.tokens).tolist(), view_floats(result.logprobs).tolist()


def alone(runner: CpuRunner, tokens: list[int]) -> tuple[int, float]:
    """The greedy token after ``tokens`` and its log-probability, from slot 60 in one chunk."""
    found = runner.run(plan(1, {"slot": 60, "tokens": tokens, "blocks": [60, 61, 62, 63], "params": GREEDY}))
    runner.run(StepPlan(step=2, closed=column([60])))
    token, logprob = answer(found)
    return token[0], logprob[0]


def test_sequences_do_not_see_each_other(runner: CpuRunner) -> None:
    prompts = [list(range(i, i + 3 + 7 * i)) for i in range(4)]
    expected = [alone(runner, p) for p in prompts]
    sequences = [{"slot": i, "tokens": p, "blocks": [10 * i + 2, 10 * i + 1], "params": GREEDY} for i, p in enumerate(prompts)]
    tokens, logprobs = answer(runner.run(plan(3, *sequences)))
    assert tokens == [t for t, _ in expected]
    np.testing.assert_allclose(logprobs, [x for _, x in expected], atol=1e-5)
    # Decode sequences and a new prefill chunk together; slot 3 is left out and slot 2 replaced.
    prompts = [[*p, t] for p, t in zip(prompts, tokens, strict=True)]
    new = list(range(50, 70))
    sequences = [{"slot": i, "start": len(prompts[i]) - 1, "tokens": prompts[i][-1:]} for i in (1, 0)]
    sequences.append({"slot": 2, "tokens": new, "blocks": [5, 7], "params": GREEDY})
    mixed = answer(runner.run(plan(4, *sequences, closed=[2])))[0]
    assert mixed == [alone(runner, prompts[1])[0], alone(runner, prompts[0])[0], alone(runner, new)[0]]
    runner.run(StepPlan(step=5, closed=column([0, 1, 2, 3])))


def test_chunks_and_found_blocks_change_nothing(runner: CpuRunner) -> None:
    prompt = [(5 * i) % 97 for i in range(50)]
    expected = alone(runner, prompt)
    runner.run(plan(1, {"slot": 0, "tokens": prompt[:33], "sample": 0, "blocks": [3, 4, 9, 8], "params": GREEDY}))
    first = answer(runner.run(plan(2, {"slot": 0, "start": 33, "tokens": prompt[33:]})))
    # Slot 1 finds the first two blocks of slot 0 computed, and shares them.
    second = answer(runner.run(plan(3, {"slot": 1, "start": 32, "tokens": prompt[32:], "blocks": [3, 4, 20, 21], "params": GREEDY})))
    for tokens, logprobs in (first, second):
        assert tokens == [expected[0]] and abs(logprobs[0] - expected[1]) < 1e-5
    runner.run(StepPlan(step=4, closed=column([0, 1])))


def test_a_broken_sequence_leaves_nothing_behind(weights: dict[str, torch.Tensor]) -> None:
    broken = dict(weights)
    broken["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    broken["model.embed_tokens.weight"][13] = torch.nan
    runner = make_runner(make_stage(MODEL, broken, positions=256), max_seq_len=256)
    healthy = list(range(20, 40))
    expected = alone(runner, healthy)[0]
    sequences = [
        {"slot": 0, "tokens": [13] * 20, "blocks": [0, 1], "params": GREEDY},
        {"slot": 1, "tokens": healthy, "blocks": [2, 3], "params": GREEDY},
    ]
    assert answer(runner.run(plan(3, *sequences)))[0] == [-1, expected]
    # The same blocks go to a healthy sequence, in whose padding the NaN would sit.
    again = {"slot": 0, "tokens": healthy, "blocks": [1, 0], "params": GREEDY}
    assert answer(runner.run(plan(4, again, closed=[0])))[0] == [expected]


def test_scores_penalties_and_alternatives(runner: CpuRunner, weights: dict[str, torch.Tensor]) -> None:
    prompt = [(5 * i) % 40 for i in range(24)]
    stage = make_stage(MODEL, weights, positions=256)
    logits: list[np.ndarray] = []
    plain = stage.logits
    stage.logits = lambda hidden: logits.append(out := plain(hidden)) or out  # type: ignore[func-returns-value,method-assign]
    recording = make_runner(stage, max_seq_len=256)
    recording.run(plan(1, {"slot": 0, "tokens": prompt, "score": 1, "sample": 0, "blocks": [1, 2], "params": GREEDY}))
    whole = logits[0].numpy()

    params = SamplingParams(
        temperature=0.0, repetition_penalty=3.0, frequency_penalty=1.0, presence_penalty=0.5, logprobs=3, prompt_logprobs=2
    )
    chunks = ({"tokens": prompt[:10], "sample": 0, "score": 1, "blocks": [1, 2], "params": params, "history": prompt, "prompt_len": 24},)
    first = runner.run(plan(1, {"slot": 7, **chunks[0]}))
    second = runner.run(plan(2, {"slot": 7, "start": 10, "tokens": prompt[10:], "score": 1}))
    assert first is not None and second is not None
    for start, result in ((0, first), (10, second)):
        sequence, own, ids, scores = result.prompt_logprobs[0]
        assert sequence == 0
        for i, value in enumerate(view_floats(own).tolist()):
            if start + i + 1 < len(prompt):
                expected, best, best_scores = logprobs_of(whole[start + i], prompt[start + i + 1], 2)
                assert abs(value - expected) < 1e-5
                assert view(ids)[2 * i : 2 * i + 2].tolist() == best
                np.testing.assert_allclose(view_floats(scores)[2 * i : 2 * i + 2], best_scores, atol=1e-5)
    token = answer(second)[0][0]
    assert token == choose(whole[-1], params, prompt, 24, 24)
    assert view(second.top[0][1]).tolist() == logprobs_of(whole[-1], token, 3)[1]
    # The sampled token joins the history with the step that computes it.
    third = runner.run(plan(3, {"slot": 7, "start": 24, "tokens": [token]}))
    recording.run(plan(2, {"slot": 0, "start": 24, "tokens": [token]}))
    assert answer(third)[0][0] == choose(logits[-1][0].numpy(), params, [*prompt, token], 24, 25)
    runner.run(StepPlan(step=4, closed=column([7])))


@pytest.mark.parametrize("pp", [2, 3, 5])
def test_a_pipeline_is_bitwise_one_stage(weights: dict[str, torch.Tensor], pp: int) -> None:
    prompts = [[(3 * i + j) % 97 for j in range(5 + 9 * i)] for i in range(3)]
    params = SamplingParams(temperature=0.9, seed=3, top_p=0.9, logprobs=4)
    opening = plan(1, *({"slot": i, "tokens": p, "blocks": [4 * i, 4 * i + 1, 4 * i + 2], "params": params} for i, p in enumerate(prompts)))

    def steps(group: Group) -> list[StepResult | None]:
        torch.set_num_threads(1)
        parallel = Parallel(pp=group.size)
        runner = make_runner(make_stage(MODEL, weights, parallel, group.rank, positions=256), pipeline=group, max_seq_len=256)
        found = [runner.run(opening)]
        for step in range(6):
            sequences = ({"slot": i, "start": len(p) + step, "tokens": [(11 * step + i) % 97]} for i, p in enumerate(prompts))
            found.append(runner.run(plan(2 + step, *sequences)))
        return found

    expected = in_threads(1, steps)[0]
    found = in_threads(pp, steps)
    assert all(result is None for stage in found[:-1] for result in stage)
    assert found[-1] == expected  # tokens, log-probabilities and alternatives, to the bit


def test_tensor_parallel_threads_agree_with_one_rank(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, heads=9, kv_heads=3, vocab=321)
    model, weights = open_artifact(folder).model, whole_weights(folder)
    sequences = [{"slot": i, "tokens": [(7 * i + 5 * j) % 300 for j in range(20 + i)], "blocks": [2 * i, 2 * i + 1]} for i in range(6)]
    opening = plan(1, *({**r, "params": GREEDY} for r in sequences))

    def member(group: Group) -> tuple[list[int], list[float]]:
        torch.set_num_threads(1)
        stage = make_stage(model, weights, Parallel(tp=group.size), group.rank, tensor=group)
        return answer(make_runner(stage, tensor=group).run(opening))

    tokens, logprobs = in_threads(1, member)[0]
    for size in (2, 3, 4, 7):
        for found in in_threads(size, member):
            assert found[0] == tokens
            np.testing.assert_allclose(found[1], logprobs, atol=1e-4)
