"""FakeEngine keeps the Engine contract, its cost model, and its word: every token can be recomputed."""

from __future__ import annotations

import json

import pytest

from tests.support.scheduler_rig import submit
from tests.support.table_guide import table_guides
from workers.engines.fake import PRINTABLE, FakeEngine, expected_tokens, score, state_of
from workers.protocol.engine import Engine, Fault, Finish
from workers.protocol.errors import TooLong, Unsupported
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.protocol.specs import FakeOptions, FakeSpec, Parallel
from workers.scheduler.step_plan import StepPlan, StepResult, column, view

SPEC = FakeSpec(max_batch_size=8, max_num_tokens=64, kv_tokens=2048, options=FakeOptions(fake_step_ms=4.0, fake_token_us=100.0))


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fake(spec: FakeSpec = SPEC, clock: Clock | None = None, **settings: object) -> FakeEngine:
    clock = clock or Clock()
    return FakeEngine(spec, clock=clock, sleep=clock.sleep, **settings)


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, Finish | Fault]]:
    tokens: dict[int, list[int]] = {}
    ends: dict[int, Finish | Fault] = {}
    for _ in range(10_000):
        if not engine.busy():
            return tokens, ends
        for emission in engine.step():
            assert emission.id not in ends
            assert emission.first == len(tokens.setdefault(emission.id, []))
            tokens[emission.id] += emission.tokens
            if emission.end is not None:
                ends[emission.id] = emission.end
    raise AssertionError("still busy")


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_stream_is_the_expected_one(stages: int) -> None:
    engine = fake(parallel=Parallel(tp=2, pp=stages))
    assert (engine.capacity.tp, engine.capacity.pp, engine.resume) == (2, stages, "bitwise")
    requests = {i: (list(range(40, 41 + 7 * i)), SamplingParams(temperature=i % 2, seed=i, max_tokens=3 + i)) for i in range(12)}
    for id, (prompt, params) in requests.items():
        engine.submit(id, submit(prompt, params))
    tokens, ends = run(engine)
    assert tokens == {id: expected_tokens(prompt, params) for id, (prompt, params) in requests.items()}
    assert {end.reason for end in ends.values()} == {"length"} and len(ends) == 12
    assert engine.stats().free_blocks == engine.capacity.num_blocks
    assert engine.step() == []
    engine.close()


def test_tokens_are_printable_and_depend_on_the_whole_prefix_and_the_seed() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=200)
    tokens = expected_tokens(list(b"hello"), greedy)
    assert set(tokens) <= set(PRINTABLE) and len(set(tokens)) > 60
    assert expected_tokens(list(b"jello"), greedy)[:5] != tokens[:5]
    assert expected_tokens(list(b"hello"), SamplingParams(temperature=0.0, seed=1, max_tokens=200)) == tokens
    seeded = [expected_tokens(list(b"hello"), SamplingParams(seed=seed, max_tokens=20)) for seed in range(3)]
    assert seeded[0] != seeded[1] != seeded[2] != seeded[0]
    assert expected_tokens(list(b"hello"), greedy, 7) == tokens[:7]
    assert expected_tokens(list(b"hello") + tokens[:9], greedy, 5) == tokens[9:14]


def test_a_step_costs_what_it_was_predicted_to() -> None:
    clock = Clock()
    engine = fake(clock=clock)
    engine.submit(0, submit([65] * 50, SamplingParams(max_tokens=3)))
    for tokens in (50, 1, 1):
        before = clock.now
        assert engine.predicted_ms() == pytest.approx(4.0 + 0.1 * tokens)
        engine.step()
        assert (clock.now - before) * 1000 == pytest.approx(4.0 + 0.1 * tokens)
        assert engine.stats().step_ms == pytest.approx(4.0 + 0.1 * tokens)


def test_a_full_pipeline_costs_no_more_than_one_stage() -> None:
    spent = []
    for stages in (1, 2):
        clock = Clock()
        engine = fake(clock=clock, parallel=Parallel(pp=stages))
        for id in range(4):
            engine.submit(id, submit([65 + id], SamplingParams(max_tokens=50)))
        run(engine)
        spent.append(clock.now)
    assert spent[1] == pytest.approx(spent[0], rel=0.1)


def test_logprobs_are_made_up_but_consistent() -> None:
    engine = fake()
    prompt = list(b"score me")
    engine.submit(0, submit(prompt, SamplingParams(temperature=0.0, max_tokens=2, logprobs=3, prompt_logprobs=1)))
    first = engine.step()[0]
    assert first.logprobs == [score(state_of(prompt), first.tokens[0], 3)]
    assert first.logprobs[0].top_ids[0] == first.tokens[0] and first.logprobs[0].logprob == first.logprobs[0].top_logprobs[0]
    assert first.prompt_logprobs[1:] == [score(state_of(prompt[:i]), prompt[i], 1) for i in range(1, len(prompt))]
    assert sorted(first.logprobs[0].top_logprobs, reverse=True) == first.logprobs[0].top_logprobs


def test_cancel_and_credit_reach_the_batch() -> None:
    engine = fake()
    engine.submit(0, submit([65], SamplingParams(max_tokens=50)))
    engine.submit(1, submit([66], SamplingParams(max_tokens=50), credit=4))
    counts = [0, 0]

    def work() -> None:
        for _ in range(100):
            for emission in engine.step():
                counts[emission.id] += len(emission.tokens)
                if counts[0] == 2:
                    engine.cancel(0)
        assert not engine.busy()

    work()
    assert counts == [2, 4]
    engine.cancel(77)
    engine.credit(1, 1000)
    work()
    assert counts == [2, 50] and engine.stats().free_blocks == engine.capacity.num_blocks


def test_guides_are_injected() -> None:
    params = SamplingParams(max_tokens=20, guide=GuideSpec(kind="choice", text=json.dumps(["left", "right"])))
    with pytest.raises(Unsupported):
        fake().submit(0, submit([65], params))
    engine = fake(guides=table_guides)
    assert engine.capacity.guided
    engine.submit(0, submit([65], params))
    tokens, ends = run(engine)
    assert bytes(tokens[0]) in (b"left", b"right") and ends[0].reason == "stop"
    assert tokens[0] == expected_tokens([65], params, guide=table_guides(params.guide))


def test_limits_come_from_the_spec() -> None:
    engine = fake(FakeSpec(max_seq_len=100, kv_tokens=64, block_size=8))
    assert (engine.capacity.num_blocks, engine.capacity.max_seq_len) == (8, 100)
    with pytest.raises(TooLong, match="context"):
        engine.submit(0, submit([65] * 90, SamplingParams(max_tokens=20)))
    with pytest.raises(TooLong, match="KV"):
        engine.submit(0, submit([65] * 60, SamplingParams(max_tokens=20)))


def test_a_disturbance_hits_one_sequence_only() -> None:
    def poison(plan: StepPlan, result: StepResult) -> StepResult:
        tokens = view(result.tokens).tolist()
        if plan.step == 3:
            tokens[0] = -1
        return StepResult(step=result.step, tokens=column(tokens))

    engine = fake(disturb=poison)
    params = SamplingParams(max_tokens=10)
    for id in range(2):
        engine.submit(id, submit([65 + id], params))
    tokens, ends = run(engine)
    assert isinstance(ends[0], Fault) and ends[0].code == "nan_logits" and tokens[0] == expected_tokens([65], params)[:2]
    assert isinstance(ends[1], Finish) and tokens[1] == expected_tokens([66], params)
