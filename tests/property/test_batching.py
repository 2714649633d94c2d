"""Properties of in-flight batching: whatever is submitted, cancelled, paused, preempted or cut, every stream is the oracle's.

The model under the scheduler (tests/support/scheduler_rig.py) reads each sequence's whole context through its block table at each step, so
a wrong share, an early free or a skipped token fails at once.
"""

from __future__ import annotations

import json

import hypothesis.strategies as st
import msgspec
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

from tests.support.examples import examples
from tests.support.scheduler_rig import Rig, capacity, submit
from tests.support.table_guide import table_guides
from workers.protocol.engine import Finish
from workers.protocol.errors import Rejected
from workers.protocol.messages import Capacity, GuideSpec, SamplingParams, Submit
from workers.scheduler.step_plan import StepPlan, view

EXAMPLES = examples(100)

#: Prompts share prefixes often: runs of one letter, a tail that may differ.
PROMPTS = st.builds(
    lambda letter, length, tail: [letter] * length + tail,
    st.sampled_from([65, 66]),
    st.integers(1, 60),
    st.lists(st.integers(48, 51), max_size=9),
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 40),
    min_tokens=st.sampled_from([0, 0, 5]),
    stop_ids=st.sampled_from([(), (), (40, 41, 42, 43, 44, 45)]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    guide=st.sampled_from([None, None, None, GuideSpec(kind="choice", text=json.dumps(["yes", "no way", "perhaps"]))]),
)
REQUESTS = st.builds(submit, PROMPTS, PARAMS, salt=st.sampled_from(["", "", "t"]), credit=st.sampled_from([0, 1, 7, 2**31 - 1]))
LIMITS = st.builds(
    capacity,
    block_size=st.sampled_from([8, 16]),
    num_blocks=st.sampled_from([14, 20, 64]),
    slots=st.integers(1, 6),
    tokens=st.integers(6, 40),
    stages=st.integers(1, 3),
)


class Batching(RuleBasedStateMachine):
    """Any order of commands, plans, results and replica deaths."""

    live = Bundle("live")

    @initialize(limits=LIMITS, cache=st.booleans(), async_scheduling=st.booleans())
    def start(self, limits: Capacity, cache: bool, async_scheduling: bool) -> None:
        self.rig = Rig(limits, guides=table_guides, prefix_cache=cache, async_scheduling=async_scheduling)

    @rule(target=live, requests=st.lists(REQUESTS, min_size=1, max_size=6))
    def arrive(self, requests: list[Submit]) -> object:
        return multiple(*[self.rig.submit(request) for request in requests])

    @rule(id=consumes(live))
    def cancel(self, id: int) -> None:
        self.rig.cancel(id)

    @rule(id=live, tokens=st.integers(1, 9))
    def credit(self, id: int, tokens: int) -> None:
        self.rig.scheduler.credit(id, tokens)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.rig.step()

    @rule()
    def schedule(self) -> None:
        self.rig.schedule()

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def update(self) -> None:
        self.rig.update()

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.rig.now += seconds

    @rule()
    def die(self) -> None:
        self.rig.restart()

    @invariant()
    def sound(self) -> None:
        self.rig.scheduler.check()
        self.rig.verify()

    def teardown(self) -> None:
        self.rig.drain()
        self.rig.verify()
        assert all(stream.cancelled != isinstance(stream.end, Finish) for stream in self.rig.streams.values()), "one did not end once"
        assert self.rig.idle(), "blocks leaked"


Batching.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
TestBatching = Batching.TestCase


def outcome(rig: Rig) -> list[object]:
    return [
        (stream.tokens, stream.logprobs, stream.prompt_logprobs, stream.end.reason, stream.end.stop_id) for stream in rig.streams.values()
    ]


@settings(max_examples=examples(80), deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=5),
    limits=LIMITS,
    cache=st.booleans(),
    async_scheduling=st.booleans(),
    cut=st.integers(0, 60),
)
def test_a_stream_depends_on_nothing_but_itself(
    requests: list[Submit], limits: Capacity, cache: bool, async_scheduling: bool, cut: int
) -> None:
    """Alone in a roomy engine, or crowded in a small one that dies after ``cut`` steps, with async scheduling or without: the same tokens,
    ends and logprobs."""
    crowded = Rig(limits, guides=table_guides, prefix_cache=cache, async_scheduling=async_scheduling)
    for request in requests:
        crowded.submit(request)
    for step in range(cut):
        crowded.step()
        for id in crowded.streams:
            crowded.scheduler.credit(id, step % 3)
    crowded.restart()
    crowded.drain()
    alone: list[object] = []
    for request in requests:
        rig = Rig(capacity(tokens=64, slots=1), guides=table_guides, prefix_cache=False)
        rig.submit(request)
        rig.drain()
        alone += outcome(rig)
    assert outcome(crowded) == alone


#: Steps, then seconds that pass, and the numbers of a sequence to cancel and of one to credit; most often there is none.
MOVES = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from([0.0, 0.0, 3.0]), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8
)


@settings(max_examples=examples(120), deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6), limits=LIMITS, cache=st.booleans(), moves=MOVES)
def test_a_repeated_step_is_the_step_that_would_be_scheduled(
    requests: list[Submit], limits: Capacity, cache: bool, moves: list[tuple[int, float, int, int]]
) -> None:
    quick, plain = (Rig(limits, guides=table_guides, prefix_cache=cache, async_scheduling=True) for _ in range(2))
    plain.scheduler._repeat = lambda step: None  # type: ignore[method-assign]
    for rig in (quick, plain):
        for request in requests:
            rig.submit(request)
    for steps, seconds, victim, creditor in moves:
        for _ in range(steps):
            for quick_plan, plain_plan in zip(*map(plans_of_step, (quick, plain)), strict=True):
                assert msgspec.structs.replace(quick_plan, repeats=0) == plain_plan
        for rig in (quick, plain):
            rig.scheduler.check()
            rig.now += seconds
            if victim < len(requests):
                rig.cancel(victim)
            rig.scheduler.credit(creditor, 3)
    assert [stream.tokens for stream in quick.streams.values()] == [stream.tokens for stream in plain.streams.values()]


def plans_of_step(rig: Rig) -> list[StepPlan]:
    """Make one engine step; its plans."""
    plans: list[StepPlan] = []
    while (plan := rig.schedule()) is not None:
        plans.append(plan)
    if rig.in_flight:
        rig.update()
    return plans


@settings(max_examples=examples(80), deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    limits=LIMITS,
    async_scheduling=st.booleans(),
    moment=st.integers(0, 30),
    victims=st.sets(st.integers(0, 5)),
)
def test_a_cancel_at_any_moment_leaks_nothing(
    requests: list[Submit], limits: Capacity, async_scheduling: bool, moment: int, victims: set[int]
) -> None:
    rig = Rig(limits, guides=table_guides, async_scheduling=async_scheduling)
    for request in requests:
        rig.submit(request)
    for _ in range(moment):
        rig.step()
    rig.schedule()
    for id in victims & rig.streams.keys():
        rig.cancel(id)
        rig.scheduler.check()
    rig.drain()
    rig.verify()
    assert rig.idle()


@settings(max_examples=examples(80), deadline=None)
@given(count=st.integers(1, 24), stages=st.integers(1, 4), async_scheduling=st.booleans())
def test_sequences_are_balanced_over_the_pipeline(count: int, stages: int, async_scheduling: bool) -> None:
    """In steady decoding any ``stages`` consecutive plans serve every sequence once, and their sizes differ by what division demands."""
    rig = Rig(capacity(slots=24, tokens=256, num_blocks=256, stages=stages), async_scheduling=async_scheduling)
    for i in range(count):
        rig.submit(submit([65 + i], SamplingParams(max_tokens=60, temperature=0.0)))
    for _ in range(12 * stages):
        rig.step()
    served: list[list[int]] = []
    for _ in range(stages * min(stages, count)):
        while (plan := rig.schedule()) is not None:
            served.append(view(plan.slots).tolist())
        rig.update()
    share = -(-count // stages)
    assert max(map(len, served)) == share
    window = [slot for slots in served[-min(stages, -(-count // share)) :] for slot in slots]
    assert sorted(window) == list(range(count))


@settings(max_examples=examples(100), deadline=None)
@given(prompt=st.integers(1, 200), max_tokens=st.integers(1, 200), blocks=st.integers(1, 30))
def test_what_is_admitted_fits_and_what_never_fits_is_refused(prompt: int, max_tokens: int, blocks: int) -> None:
    rig = Rig(capacity(num_blocks=blocks, slots=2, context=256))
    fits = prompt + max_tokens <= 256 and max(prompt, prompt + max_tokens - 1) <= blocks * 8
    try:
        rig.submit(submit([65] * prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0)))
    except Rejected as error:
        assert error.code == "context_length_exceeded" and not fits
        assert not rig.scheduler.busy()
    else:
        assert fits
        rig.drain()
        rig.verify()
