"""In-flight batching, case by case: what each plan holds, who is preempted, how sequences end."""

from __future__ import annotations

import json

import pytest

from tests.support.scheduler_rig import EOS, Rig, capacity, submit
from tests.support.table_guide import table_guides
from workers.engines.fake import expected_tokens
from workers.protocol.engine import PAUSE_S, Fault, Finish
from workers.protocol.errors import EngineFault, Rejected, TooLong, Unsupported
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.scheduler.scheduler import CHECK_STEPS, Scheduler
from workers.scheduler.step_plan import PLACEHOLDER, StepPlan, StepResult, column, view


def greedy(max_tokens: int = 8, **settings: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **settings)


def columns(plan: StepPlan) -> list[tuple[int, int, int, int]]:
    """(slot, start, length, sample) of each sequence."""
    return list(zip(*[view(data).tolist() for data in (plan.slots, plan.starts, plan.lengths, plan.sample)], strict=True))


def test_a_prompt_is_computed_in_chunks_beside_decodes() -> None:
    rig = Rig(capacity(tokens=10, slots=4))
    rig.submit(submit([65] * 3, greedy()))
    assert columns(rig.schedule()) == [(0, 0, 3, 1)]
    rig.update()
    rig.submit(submit([66] * 20, greedy()))
    seen = []
    for _ in range(4):
        seen.append(columns(rig.schedule()))
        rig.update()
    assert seen == [
        [(0, 3, 1, 1), (1, 0, 9, 0)],
        [(0, 4, 1, 1), (1, 9, 9, 0)],
        [(0, 5, 1, 1), (1, 18, 2, 1)],
        [(0, 6, 1, 1), (1, 20, 1, 1)],
    ]


def test_a_plan_opens_slots_appends_blocks_and_closes() -> None:
    rig = Rig(capacity(slots=2))
    rig.submit(submit([65] * 7, greedy(3, repetition_penalty=1.5)))
    first = rig.schedule()
    assert [opened.slot for opened in first.opened] == [0] and first.opened[0].prompt_len == 7
    assert view(first.opened[0].history).tolist() == [65] * 7
    assert len(view(first.block_ids)) == 1 and not first.closed
    rig.update()
    second = rig.schedule()  # position 7 is the block's last
    assert not second.opened and not second.block_ids
    rig.update()
    third = rig.schedule()
    assert view(third.block_slots).tolist() == [0] and view(third.block_ids)[0] not in view(first.block_ids)
    (last,) = rig.update()
    assert isinstance(last.end, Finish) and last.end.reason == "length"
    assert rig.schedule() is None
    rig.submit(submit([66], greedy()))
    after = rig.schedule()
    assert view(after.closed).tolist() == [0] and after.opened[0].slot == 0 and after.opened[0].history == b""


def test_a_known_prefix_is_not_computed_again_but_for_its_last_token() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 64))
    rig.submit(submit(prompt, greedy()))
    rig.drain()
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.schedule()) == [(0, 16, 8, 1)]
    rig.submit(submit([*prompt, 64], greedy(), salt="another tenant"))
    rig.update()
    assert columns(rig.schedule())[1][1:3] == (0, 25)
    rig.drain()
    rig.submit(submit([*prompt, 64], greedy()))
    assert columns(rig.schedule())[0][1:3] == (24, 1)
    rig.drain()
    rig.verify()
    assert [stream.end.usage.cached_tokens for stream in rig.streams.values()] == [0, 16, 0, 24]
    stats = rig.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (24 + 24 + 25 + 25, 16 + 24)


def test_an_answer_is_found_by_the_next_turn() -> None:
    rig = Rig(capacity())
    rig.submit(submit([65] * 10, greedy(20)))
    rig.drain()
    rig.submit(submit([65] * 10 + rig.streams[0].tokens, greedy()))
    assert columns(rig.schedule())[0][1] == 24


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize(("leave", "found"), [("end", 48), ("cancel", 40)])
def test_a_prompt_is_findable_when_computed_and_its_answer_when_the_sequence_leaves(leave: str, found: int, async_scheduling: bool) -> None:
    rig, prompt = Rig(capacity(), async_scheduling=async_scheduling), [65] * 20
    rig.submit(submit(prompt, greedy(30)))
    while len(rig.streams[0].tokens) < 22:
        rig.step()
    rig.submit(submit([*prompt, 70], greedy(1)))
    rig.finish(1)
    if leave == "cancel":
        rig.cancel(0)
    rig.drain()
    rig.submit(submit(prompt + expected_tokens(prompt, greedy(30)), greedy(1)))
    rig.drain()
    rig.verify()
    assert [rig.streams[i].end.usage.cached_tokens for i in (1, 2)] == [16, found]


def test_prompt_logprobs_want_the_whole_prompt_computed() -> None:
    rig = Rig(capacity(tokens=8))
    prompt = list(range(40, 60))
    rig.submit(submit(prompt, greedy()))
    rig.drain()
    rig.submit(submit(prompt, greedy(prompt_logprobs=2)))
    plan = rig.schedule()
    assert columns(plan) == [(0, 0, 8, 0)] and view(plan.score).tolist() == [1]
    rig.drain()
    scores = rig.streams[1].prompt_logprobs
    assert [entry.token for entry in scores] == prompt
    assert scores[0].logprob is None and not scores[0].top_ids
    assert all(entry.logprob < 0 and len(entry.top_ids) == 2 for entry in scores[1:])
    rig.verify()


@pytest.mark.parametrize("prompt", [[65], [65] * 20])
def test_scoring_alone_emits_nothing(prompt: list[int]) -> None:
    rig = Rig(capacity(tokens=8))
    rig.submit(submit(prompt, greedy(0, prompt_logprobs=0)))
    rig.drain()
    assert len(rig.streams[0].prompt_logprobs) == len(prompt) and rig.streams[0].tokens == []
    assert rig.streams[0].end.reason == "length"


def test_the_youngest_is_preempted_and_continues_exactly() -> None:
    rig = Rig(capacity(num_blocks=9, slots=4), prefix_cache=False)
    for letter in (65, 66, 67):
        rig.submit(submit([letter] * 6, greedy(40)))
    rig.drain()
    rig.verify()
    preemptions = [stream.end.usage.preemptions for stream in rig.streams.values()]
    assert preemptions[0] == 0 and preemptions[2] > 0
    assert rig.scheduler.stats().preemptions_total == sum(preemptions)
    assert rig.idle()


def test_a_paused_sequence_is_preempted_before_a_running_one() -> None:
    rig = Rig(capacity(num_blocks=6, slots=4), prefix_cache=False)
    rig.submit(submit([65] * 6, greedy(30), credit=1))
    rig.submit(submit([66] * 6, greedy(36)))
    rig.finish(1)
    assert rig.streams[1].end.usage.preemptions == 0 and len(rig.streams[0].tokens) == 1
    rig.drain()
    rig.verify()
    assert rig.streams[0].end.usage.preemptions == 1


def test_a_sequence_in_flight_is_never_preempted() -> None:
    """Two younger sequences decode with all of the token budget, so an older one waits amid its prompt, when the blocks are used up."""
    rig = Rig(capacity(tokens=2, num_blocks=12, slots=3), prefix_cache=False, async_scheduling=True)
    rig.submit(submit([65] * 24, greedy(40), credit=1))
    while not rig.streams[0].tokens:
        rig.step()
    rig.now += PAUSE_S + 1
    rig.step()
    rig.submit(submit([66] * 6, greedy(60)))
    rig.submit(submit([67] * 6, greedy(60), credit=3))
    while len(rig.streams[2].tokens) < 3:
        rig.step()
    rig.scheduler.credit(0, 40)
    for _ in range(4):
        rig.step()
    rig.scheduler.credit(2, 60)
    while rig.scheduler.busy(rig.now):
        rig.step()
        rig.scheduler.check()
    rig.drain()
    rig.verify()


def test_a_prompt_that_is_scored_again_is_reported_once() -> None:
    """The growth of the older sequence preempts the younger one amid its scores; it then scores from the start."""
    rig = Rig(capacity(tokens=2, num_blocks=5, slots=2))
    rig.submit(submit([66] * 3, greedy(37)))
    rig.submit(submit(list(range(40, 64)), greedy(4, prompt_logprobs=1)))
    rig.finish(1)
    rig.verify()
    assert rig.streams[1].end.usage.preemptions == 1
    assert [entry.token for entry in rig.streams[1].prompt_logprobs] == list(range(40, 64))


def test_credit_pauses_and_resumes() -> None:
    rig = Rig(capacity())
    rig.submit(submit([65], greedy(10), credit=3))
    for _ in range(6):
        rig.step()
    assert len(rig.streams[0].tokens) == 3 and not rig.scheduler.busy()
    rig.scheduler.credit(0, 2)
    rig.scheduler.credit(99, 5)
    assert rig.scheduler.busy()
    for _ in range(6):
        rig.step()
    assert len(rig.streams[0].tokens) == 5
    rig.drain()
    rig.verify()


def test_a_long_pause_gives_up_the_cache() -> None:
    rig = Rig(capacity(), prefix_cache=False)
    rig.submit(submit([65], greedy(10), credit=2))
    for _ in range(3):
        rig.step()
    rig.now = PAUSE_S - 0.1
    assert not rig.scheduler.busy(rig.now) and not rig.idle()
    rig.now = PAUSE_S + 0.1
    assert rig.scheduler.busy(rig.now)
    rig.step()
    assert rig.idle() and not rig.scheduler.busy(rig.now)
    rig.drain()
    rig.verify()


def test_paused_sequences_never_keep_a_lone_waiting_one_out() -> None:
    rig = Rig(capacity(slots=1))
    rig.submit(submit([65], greedy(10), credit=2))
    for _ in range(3):
        rig.step()
    rig.submit(submit([66], greedy(4)))
    rig.step()  # at once: nothing else runs
    assert len(rig.streams[1].tokens) == 1
    rig.drain()
    rig.verify()


def test_the_waiting_queue_is_strictly_first_come_first_served() -> None:
    """A long prompt that finds too few blocks is at the head: the short ones behind it, which would fit, wait for it."""
    rig = Rig(capacity(num_blocks=8, slots=4), prefix_cache=False)
    rig.submit(submit([65] * 30, greedy(8)))
    rig.step()
    for letter, length in ((66, 34), (67, 3), (68, 3)):
        rig.submit(submit([letter] * length, greedy(4)))
    while rig.streams[0].end is None:
        rig.step()
        stats = rig.scheduler.stats()
        assert stats.free_blocks >= 1 + stats.running, "one block and the reserve: a short one would fit"
        assert stats.waiting == 3, "a short one overtook the head"
    first_tokens = []
    while len(first_tokens) < 3:
        rig.step()
        first_tokens += [id for id in (1, 2, 3) if rig.streams[id].tokens and id not in first_tokens]
    assert first_tokens == [1, 2, 3]
    rig.drain()
    rig.verify()


@pytest.mark.parametrize(("num_blocks", "admitted"), [(5, False), (6, True)])
def test_admission_keeps_one_block_in_reserve_for_each_running_sequence(num_blocks: int, admitted: bool) -> None:
    """Two run with a block each; the third one needs two blocks, and is admitted where two more are free."""
    rig = Rig(capacity(num_blocks=num_blocks, slots=4), prefix_cache=False)
    for letter in (65, 66):
        rig.submit(submit([letter] * 3, greedy(4)))
    rig.step()
    assert (rig.scheduler.stats().running, rig.scheduler.stats().free_blocks) == (2, num_blocks - 2)
    rig.submit(submit([67] * 12, greedy(4)))
    rig.step()
    assert (rig.scheduler.stats().running, rig.scheduler.stats().waiting) == ((3, 0) if admitted else (2, 1))
    rig.drain()
    rig.verify()


def test_a_cancel_in_flight_frees_after_the_step() -> None:
    rig = Rig(capacity(stages=2))
    rig.submit(submit([65] * 20, greedy()))
    held = set(view(rig.schedule().block_ids).tolist())
    rig.cancel(0)
    assert not rig.idle()
    rig.submit(submit([66] * 20, greedy()))
    assert held.isdisjoint(view(rig.schedule().block_ids).tolist())
    rig.update()
    rig.drain()
    rig.verify()
    assert rig.idle() and rig.streams[0].end is None


def test_async_scheduling_goes_on_from_a_placeholder() -> None:
    rig = Rig(capacity(), async_scheduling=True)
    rig.submit(submit([65] * 6, greedy(4)))
    assert columns(rig.schedule()) == [(0, 0, 6, 1)]
    second = rig.schedule()
    assert columns(second) == [(0, 6, 1, 1)] and view(second.tokens).tolist() == [PLACEHOLDER]
    assert rig.schedule() is None, "one step more, not two"
    rig.update()
    third = rig.schedule()
    assert columns(third) == [(0, 7, 1, 1)] and view(third.tokens).tolist() == [PLACEHOLDER]
    rig.update()
    assert columns(rig.schedule()) == [(0, 8, 1, 1)]
    rig.update()
    assert rig.schedule() is None, "the fourth token is the last, and that is known before it is there"
    rig.drain()
    rig.verify()
    assert rig.idle()


def test_what_is_planned_behind_an_end_is_dropped_and_keeps_its_blocks_until_then() -> None:
    stop = expected_tokens([65] * 6, greedy(9))[0]
    rig = Rig(capacity(), async_scheduling=True, prefix_cache=False)
    rig.submit(submit([65] * 6, greedy(9, stop_ids=(stop,))))
    rig.schedule()
    rig.schedule()
    (ended,) = rig.update()
    assert ended.end is not None and ended.end.reason == "stop" and not ended.tokens
    assert not rig.idle() and rig.scheduler.busy(), "the second plan may still write"
    assert rig.update() == [] and rig.idle() and not rig.scheduler.busy()


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"guide": GuideSpec(kind="choice", text='["yes"]')}])
def test_a_choice_that_needs_the_last_token_waits_for_it(settings: dict[str, object]) -> None:
    rig = Rig(capacity(), guides=table_guides, async_scheduling=True)
    rig.submit(submit([65], greedy(4, **settings)))
    rig.schedule()
    assert rig.schedule() is None
    rig.drain()
    rig.verify()


def test_long_prompts_go_on_while_their_chunks_are_in_flight() -> None:
    rig = Rig(capacity(tokens=8), async_scheduling=True)
    rig.submit(submit(list(range(40, 60)), greedy(3, prompt_logprobs=1)))
    assert columns(rig.schedule()) == [(0, 0, 8, 0)] and columns(rig.schedule()) == [(0, 8, 8, 0)]
    rig.update()
    assert columns(rig.schedule()) == [(0, 16, 4, 1)]
    rig.drain()
    rig.verify()


def test_a_nan_ends_its_own_sequence_and_poisons_no_cache() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 60))
    rig.submit(submit(prompt, greedy()))
    rig.submit(submit([66] * 5, greedy()))
    plan = rig.schedule()
    rig.in_flight.clear()
    bad, good = rig.scheduler.update_from_output(StepResult(step=plan.step, tokens=column([-1, 70])))
    assert isinstance(bad.end, Fault) and bad.end.code == "nan_logits" and bad.tokens == []
    assert good.end is None and good.tokens == [70]
    rig.scheduler.check()
    rig.cancel(1)
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.schedule())[0][1] == 0


def test_nothing_is_findable_behind_what_a_fault_has_spoiled() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 60))
    for _ in range(2):
        rig.submit(submit(prompt, greedy(40)))
        rig.step()
    rig.schedule()
    result = rig.model.run(rig.in_flight.popleft())
    good, bad = rig.scheduler.update_from_output(StepResult(step=result.step, tokens=column([view(result.tokens)[0], -1])))
    assert good.end is None and isinstance(bad.end, Fault)
    rig.streams[0].tokens += good.tokens
    rig.finish(0)
    rig.scheduler.check()
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.schedule())[0][1] == 0


def test_a_result_out_of_order_is_refused() -> None:
    rig = Rig(capacity(stages=2))
    for letter in (65, 66):
        rig.submit(submit([letter], greedy()))
        rig.schedule()
    with pytest.raises(EngineFault, match="out of order"):
        rig.scheduler.update_from_output(StepResult(step=rig.in_flight[1].step, tokens=column([70])))


def test_stop_rules() -> None:
    free = expected_tokens([65], greedy(30))
    stop = free[4]
    first = free.index(stop)
    rig = Rig(capacity())
    rig.submit(submit([65], greedy(30, stop_ids=(stop,))))
    rig.submit(submit([65], greedy(30, stop_ids=(stop,), min_tokens=first + 1)))
    rig.submit(submit([65], greedy(3, stop_ids=(stop,) if stop not in free[:3] else ())))
    rig.drain()
    rig.verify()
    ended, held, short = (rig.streams[i] for i in range(3))
    assert ended.tokens == free[:first] and (ended.end.reason, ended.end.stop_id) == ("stop", stop)
    assert len(held.tokens) > first
    assert (short.end.reason, short.end.stop_id, short.end.usage.output_tokens) == ("length", None, 3)


def test_a_stop_token_before_min_tokens_is_a_token() -> None:
    scheduler = Scheduler(capacity(), eos_ids=EOS)
    scheduler.submit(0, submit([65], greedy(9, min_tokens=2)))
    emitted = []
    for _ in range(3):
        emitted += scheduler.update_from_output(StepResult(step=scheduler.schedule().step, tokens=column([EOS[0]])))
    assert not scheduler.busy()
    assert [emission.tokens for emission in emitted] == [[EOS[0]], [EOS[0]], []] and emitted[-1].end.stop_id == EOS[0]


@pytest.mark.parametrize(("ignore", "reason"), [(False, "stop"), (True, "length")])
def test_eos_ends_a_sequence_unless_ignored(ignore: bool, reason: str) -> None:
    scheduler = Scheduler(capacity(), eos_ids=EOS)
    scheduler.submit(0, submit([65], greedy(2, ignore_eos=ignore)))
    emitted = []
    for _ in range(2 if ignore else 1):
        emitted += scheduler.update_from_output(StepResult(step=scheduler.schedule().step, tokens=column([EOS[0]])))
    assert not scheduler.busy()
    assert emitted[-1].end.reason == reason
    assert [token for emission in emitted for token in emission.tokens] == ([EOS[0]] * 2 if ignore else [])


def test_a_resumed_sequence_continues_after_what_was_emitted() -> None:
    params = SamplingParams(temperature=1.0, seed=9, max_tokens=20, logprobs=1)
    whole = expected_tokens([65] * 30, params)
    for cut in (1, 13, 20):
        rig = Rig(capacity(tokens=16))
        rig.submit(submit([65] * 30, params, emitted=whole[:cut]))
        rig.drain()
        rig.verify()
        assert rig.streams[0].tokens == whole and len(rig.streams[0].logprobs) == 20 - cut


def choice(*texts: str) -> SamplingParams:
    return greedy(20, guide=GuideSpec(kind="choice", text=json.dumps(texts)))


def test_a_guide_masks_advances_and_ends_the_sequence() -> None:
    rig = Rig(capacity(), guides=table_guides)
    rig.submit(submit([65], choice("yes", "no")))
    rig.submit(submit([66], greedy()))
    plan = rig.schedule()
    assert [index for index, _ in plan.masks] == [0]
    rig.drain()
    rig.verify()
    assert bytes(rig.streams[0].tokens).decode() in ("yes", "no")
    assert (rig.streams[0].end.reason, rig.streams[0].end.stop_id) == ("stop", None)


def test_a_guide_is_rebuilt_from_what_was_emitted() -> None:
    rig = Rig(capacity(), guides=table_guides)
    rig.submit(submit([65], choice("yes", "yonder"), emitted=list(b"yo")))
    rig.submit(submit([65], choice("yes", "yonder"), emitted=list(b"yes")))
    rig.drain()
    assert [bytes(stream.tokens) for stream in rig.streams.values()] == [b"yonder", b"yes"]
    assert all(stream.end.reason == "stop" for stream in rig.streams.values())


@pytest.mark.parametrize("token", [ord("n"), 300])
def test_a_token_against_the_grammar_is_the_fault_of_its_sequence(token: int) -> None:
    """The end of the output too: an answer that is not whole must not look as if it were."""
    scheduler = Scheduler(capacity(), eos_ids=(300,), guides=table_guides)
    scheduler.submit(0, submit([65], choice("yes")))
    (emission,) = scheduler.update_from_output(StepResult(step=scheduler.schedule().step, tokens=column([token])))
    assert isinstance(emission.end, Fault) and emission.end.code == "engine_fault" and emission.tokens == []
    scheduler.check()


@pytest.mark.parametrize(
    ("request_", "kind", "code"),
    [
        (submit([], greedy()), Rejected, "invalid_request"),
        (submit([320], greedy()), Rejected, "invalid_request"),
        (submit([65, -1], greedy()), Rejected, "invalid_request"),
        (submit([65] * 500, greedy(13)), TooLong, "context_length_exceeded"),
        (submit([65] * 60, greedy(70)), TooLong, "context_length_exceeded"),
        (submit([65], greedy(guide=GuideSpec(kind="regex", text="a"))), Rejected, "invalid_schema"),
        (submit([65], choice("yes"), emitted=[66]), Rejected, "invalid_request"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_nothing(request_: object, kind: type[Rejected], code: str) -> None:
    scheduler = Scheduler(capacity(num_blocks=16), guides=table_guides)
    with pytest.raises(kind) as caught:
        scheduler.submit(0, request_)
    assert caught.value.code == code and caught.value.what
    assert not scheduler.busy() and scheduler.stats().waiting == 0
    scheduler.submit(0, submit([65], greedy()))


def test_guided_requests_are_refused_where_no_grammar_is_followed() -> None:
    with pytest.raises(Unsupported):
        Scheduler(capacity()).submit(0, submit([65], choice("yes")))


def test_an_id_is_used_once_at_a_time() -> None:
    scheduler = Scheduler(capacity())
    scheduler.submit(0, submit([65], greedy()))
    with pytest.raises(ValueError, match="live"):
        scheduler.submit(0, submit([65], greedy()))


def test_stats_and_prediction() -> None:
    rig = Rig(capacity(tokens=32, slots=2))
    for length in (10, 40, 5):
        rig.submit(submit([65 + length] * length, greedy()))
    assert rig.scheduler.predicted_tokens() == 32
    assert (rig.scheduler.stats().waiting, rig.scheduler.stats().prefill_tokens) == (3, 55)
    rig.step()
    stats = rig.scheduler.stats(1.5)
    assert (stats.running, stats.waiting, stats.step_ms) == (2, 1, 1.5)
    assert (stats.prompt_tokens_total, stats.output_tokens_total, stats.free_blocks) == (50, 1, 64 - 2 - 5)
    rig.drain()
    assert rig.scheduler.stats().output_tokens_total == 24 and rig.scheduler.predicted_tokens() == 0


def test_most_decode_steps_repeat_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[bool] = []
    plain = Scheduler._repeat
    monkeypatch.setattr(Scheduler, "_repeat", lambda self, step: repeated.append((plan := plain(self, step)) is not None) or plan)
    rig = Rig(capacity(num_blocks=64), async_scheduling=True)
    for i in range(3):
        rig.submit(submit([65 + i] * 10, greedy(60)))
    rig.drain()
    rig.verify()
    assert sum(repeated) > 50
    rig.submit(submit([65] * 10, greedy(60)))
    rig.step()
    rig.submit(submit([66] * 10, greedy(60)))
    repeated.clear()
    assert len(view(rig.schedule().slots)) == 2 and not any(repeated), "a newcomer waits for nobody's end"
    rig.drain()
    rig.verify()


def test_an_idle_scheduler_checks_itself_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    monkeypatch.setattr(Scheduler, "check", lambda self: checks.append(1))
    rig = Rig(capacity())

    def checked() -> int:
        before = len(checks)
        rig.scheduler.on_idle()
        return len(checks) - before

    for length, due in ((CHECK_STEPS - 1, False), (1, True), (CHECK_STEPS, True)):
        rig.submit(submit([65], greedy(length)))
        for _ in range(length - 1):
            rig.step()
        assert rig.scheduler.busy() and not checked(), "not beside a sequence"
        rig.drain()
        assert [checked(), checked()] == [due, False]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_prefix_hit_is_told_once_with_the_first_token(async_scheduling: bool) -> None:
    """A router that ends a sequence itself (a stop string) reads no usage of it."""
    rig = Rig(capacity(), async_scheduling=async_scheduling)
    prompt = list(range(1, 21))
    told: list[list[int]] = []
    for _ in range(2):
        id = rig.submit(submit(prompt, SamplingParams(max_tokens=6)))
        found: list[int] = []
        while rig.streams[id].end is None:
            while rig.schedule() is not None:
                pass
            found += [emission.cached_tokens for emission in rig.update() if emission.tokens]
        told.append(found)
    assert told == [[0] * 6, [16, 0, 0, 0, 0, 0]]
