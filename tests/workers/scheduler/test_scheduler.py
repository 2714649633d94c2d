"""In-flight batching, case by case: what each plan holds, who is preempted, how rows end."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from tests.support.batching_rig import EOS, Rig, capacity, submit
from tests.support.table_guide import table_guides
from workers.engines.fake import expected_tokens
from workers.protocol.engine import Fault, Finish
from workers.protocol.errors import EngineFault, Rejected, TooLong, Unsupported
from workers.protocol.messages import UNLIMITED, GuideSpec, SamplingParams
from workers.scheduler.scheduler import CHECK_STEPS, PAUSE_S, Scheduler
from workers.scheduler.step_plan import GUESS, StepPlan, StepResult, column, encode, view


def greedy(max_tokens: int = 8, **settings: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **settings)


def columns(plan: StepPlan) -> list[tuple[int, int, int, int]]:
    """(slot, start, length, sample) of each row."""
    return list(zip(*[view(data).tolist() for data in (plan.slots, plan.starts, plan.lengths, plan.sample)], strict=True))


def test_a_prompt_is_computed_in_chunks_beside_decodes() -> None:
    rig = Rig(capacity(tokens=10, rows=4))
    rig.submit(submit([65] * 3, greedy()))
    assert columns(rig.plan()) == [(0, 0, 3, 1)]
    rig.commit()
    rig.submit(submit([66] * 20, greedy()))
    seen = []
    for _ in range(4):
        seen.append(columns(rig.plan()))
        rig.commit()
    assert seen == [
        [(0, 3, 1, 1), (1, 0, 9, 0)],
        [(0, 4, 1, 1), (1, 9, 9, 0)],
        [(0, 5, 1, 1), (1, 18, 2, 1)],
        [(0, 6, 1, 1), (1, 20, 1, 1)],
    ]


def test_a_plan_opens_slots_appends_blocks_and_closes() -> None:
    rig = Rig(capacity(rows=2))
    rig.submit(submit([65] * 7, greedy(3, repetition_penalty=1.5)))
    first = rig.plan()
    assert [opened.slot for opened in first.opened] == [0] and first.opened[0].prompt_len == 7
    assert view(first.opened[0].history).tolist() == [65] * 7
    assert len(view(first.block_ids)) == 1 and not first.closed
    rig.commit()
    second = rig.plan()  # position 7 is the block's last
    assert not second.opened and not second.block_ids
    rig.commit()
    third = rig.plan()
    assert view(third.block_slots).tolist() == [0] and view(third.block_ids)[0] not in view(first.block_ids)
    (last,) = rig.commit()
    assert isinstance(last.end, Finish) and last.end.reason == "length"
    assert rig.plan() is None
    rig.submit(submit([66], greedy()))
    after = rig.plan()
    assert view(after.closed).tolist() == [0] and after.opened[0].slot == 0 and after.opened[0].history == b""


def test_a_known_prefix_is_not_computed_again_but_for_its_last_token() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 64))
    rig.submit(submit(prompt, greedy()))
    rig.drain()
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.plan()) == [(0, 16, 8, 1)]
    rig.submit(submit([*prompt, 64], greedy(), salt="another tenant"))
    rig.commit()
    assert columns(rig.plan())[1][1:3] == (0, 25)
    rig.drain()
    rig.submit(submit([*prompt, 64], greedy()))
    assert columns(rig.plan())[0][1:3] == (24, 1)
    rig.drain()
    rig.verify()
    assert [stream.end.usage.cached_tokens for stream in rig.streams.values()] == [0, 16, 0, 24]
    stats = rig.batch.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (24 + 24 + 25 + 25, 16 + 24)


def test_an_answer_is_found_by_the_next_turn() -> None:
    rig = Rig(capacity())
    rig.submit(submit([65] * 10, greedy(20)))
    rig.drain()
    rig.submit(submit([65] * 10 + rig.streams[0].tokens, greedy()))
    assert columns(rig.plan())[0][1] == 24


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("leave", "found"), [("end", 48), ("cancel", 40)])
def test_a_prompt_is_findable_when_computed_and_its_answer_when_the_row_leaves(leave: str, found: int, ahead: bool) -> None:
    rig, prompt = Rig(capacity(), ahead=ahead), [65] * 20
    rig.submit(submit(prompt, greedy(30)))
    while len(rig.streams[0].tokens) < 22:
        rig.turn()
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
    plan = rig.plan()
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
    rig = Rig(capacity(num_blocks=9, rows=4), prefix_cache=False)
    for letter in (65, 66, 67):
        rig.submit(submit([letter] * 6, greedy(40)))
    rig.drain()
    rig.verify()
    preemptions = [stream.end.usage.preemptions for stream in rig.streams.values()]
    assert preemptions[0] == 0 and preemptions[2] > 0
    assert rig.batch.stats().preemptions_total == sum(preemptions)
    assert rig.idle()


def test_a_paused_row_is_preempted_before_a_running_one() -> None:
    rig = Rig(capacity(num_blocks=6, rows=4), prefix_cache=False)
    rig.submit(submit([65] * 6, greedy(30), credit=1))
    rig.submit(submit([66] * 6, greedy(36)))
    rig.finish(1)
    assert rig.streams[1].end.usage.preemptions == 0 and len(rig.streams[0].tokens) == 1
    rig.drain()
    rig.verify()
    assert rig.streams[0].end.usage.preemptions == 1


def test_a_prompt_that_is_scored_again_is_reported_once() -> None:
    """The elder row's growth preempts the younger one amid its scores; it then scores from the start."""
    rig = Rig(capacity(tokens=2, num_blocks=5, rows=2))
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
        rig.turn()
    assert len(rig.streams[0].tokens) == 3 and not rig.batch.busy()
    rig.batch.credit(0, 2)
    rig.batch.credit(99, 5)
    assert rig.batch.busy()
    for _ in range(6):
        rig.turn()
    assert len(rig.streams[0].tokens) == 5
    rig.drain()
    rig.verify()


def test_a_long_pause_gives_up_the_cache() -> None:
    rig = Rig(capacity(), prefix_cache=False)
    rig.submit(submit([65], greedy(10), credit=2))
    for _ in range(3):
        rig.turn()
    rig.now = PAUSE_S - 0.1
    assert not rig.batch.busy(rig.now) and not rig.idle()
    rig.now = PAUSE_S + 0.1
    assert rig.batch.busy(rig.now)
    rig.turn()
    assert rig.idle() and not rig.batch.busy(rig.now)
    rig.drain()
    rig.verify()


def test_paused_rows_never_keep_a_lone_waiting_row_out() -> None:
    rig = Rig(capacity(rows=1))
    rig.submit(submit([65], greedy(10), credit=2))
    for _ in range(3):
        rig.turn()
    rig.submit(submit([66], greedy(4)))
    rig.turn()  # at once: nothing else runs
    assert len(rig.streams[1].tokens) == 1
    rig.drain()
    rig.verify()


def test_a_cancel_in_flight_frees_after_the_step() -> None:
    rig = Rig(capacity(stages=2))
    rig.submit(submit([65] * 20, greedy()))
    held = set(view(rig.plan().block_ids).tolist())
    rig.cancel(0)
    assert not rig.idle()
    rig.submit(submit([66] * 20, greedy()))
    assert held.isdisjoint(view(rig.plan().block_ids).tolist())
    rig.commit()
    rig.drain()
    rig.verify()
    assert rig.idle() and rig.streams[0].end is None


def test_one_plan_ahead_goes_on_from_a_guess() -> None:
    rig = Rig(capacity(), ahead=True)
    rig.submit(submit([65] * 6, greedy(4)))
    assert columns(rig.plan()) == [(0, 0, 6, 1)]
    second = rig.plan()
    assert columns(second) == [(0, 6, 1, 1)] and view(second.tokens).tolist() == [GUESS]
    assert rig.plan() is None, "one plan ahead, not two"
    rig.commit()
    third = rig.plan()
    assert columns(third) == [(0, 7, 1, 1)] and view(third.tokens).tolist() == [GUESS]
    rig.commit()
    assert columns(rig.plan()) == [(0, 8, 1, 1)]
    rig.commit()
    assert rig.plan() is None, "the fourth token is the last, and that is known before it is there"
    rig.drain()
    rig.verify()
    assert rig.idle()


def test_what_is_planned_behind_an_end_is_dropped_and_keeps_its_blocks_until_then() -> None:
    stop = expected_tokens([65] * 6, greedy(9))[0]
    rig = Rig(capacity(), ahead=True, prefix_cache=False)
    rig.submit(submit([65] * 6, greedy(9, stop_ids=(stop,))))
    rig.plan()
    rig.plan()
    (ended,) = rig.commit()
    assert ended.end is not None and ended.end.reason == "stop" and not ended.tokens
    assert not rig.idle() and rig.batch.busy(), "the second plan may still write"
    assert rig.commit() == [] and rig.idle() and not rig.batch.busy()


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"guide": GuideSpec(kind="choice", text='["yes"]')}])
def test_a_choice_that_needs_the_last_token_waits_for_it(settings: dict[str, object]) -> None:
    rig = Rig(capacity(), guides=table_guides, ahead=True)
    rig.submit(submit([65], greedy(4, **settings)))
    rig.plan()
    assert rig.plan() is None
    rig.drain()
    rig.verify()


def test_long_prompts_go_on_while_their_chunks_are_in_flight() -> None:
    rig = Rig(capacity(tokens=8), ahead=True)
    rig.submit(submit(list(range(40, 60)), greedy(3, prompt_logprobs=1)))
    assert columns(rig.plan()) == [(0, 0, 8, 0)] and columns(rig.plan()) == [(0, 8, 8, 0)]
    rig.commit()
    assert columns(rig.plan()) == [(0, 16, 4, 1)]
    rig.drain()
    rig.verify()


def test_a_nan_ends_its_own_row_and_poisons_no_cache() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 60))
    rig.submit(submit(prompt, greedy()))
    rig.submit(submit([66] * 5, greedy()))
    plan = rig.plan()
    rig.flights.clear()
    bad, good = rig.batch.commit(StepResult(step=plan.step, tokens=column([-1, 70])))
    assert isinstance(bad.end, Fault) and bad.end.code == "nan_logits" and bad.tokens == []
    assert good.end is None and good.tokens == [70]
    rig.batch.check()
    rig.cancel(1)
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.plan())[0][1] == 0


def test_nothing_is_findable_behind_what_a_fault_has_spoiled() -> None:
    rig = Rig(capacity())
    prompt = list(range(40, 60))
    for _ in range(2):
        rig.submit(submit(prompt, greedy(40)))
        rig.turn()
    rig.plan()
    result = rig.model.run(rig.flights.popleft())
    good, bad = rig.batch.commit(StepResult(step=result.step, tokens=column([view(result.tokens)[0], -1])))
    assert good.end is None and isinstance(bad.end, Fault)
    rig.streams[0].tokens += good.tokens
    rig.finish(0)
    rig.batch.check()
    rig.submit(submit(prompt, greedy()))
    assert columns(rig.plan())[0][1] == 0


def test_a_result_out_of_order_is_refused() -> None:
    rig = Rig(capacity(stages=2))
    for letter in (65, 66):
        rig.submit(submit([letter], greedy()))
        rig.plan()
    with pytest.raises(EngineFault, match="out of order"):
        rig.batch.commit(StepResult(step=rig.flights[1].step, tokens=column([70])))


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
    batch = Scheduler(capacity(), eos_ids=EOS)
    batch.submit(0, submit([65], greedy(9, min_tokens=2)))
    emitted = []
    for _ in range(3):
        emitted += batch.commit(StepResult(step=batch.plan().step, tokens=column([EOS[0]])))
    assert not batch.busy()
    assert [emission.tokens for emission in emitted] == [[EOS[0]], [EOS[0]], []] and emitted[-1].end.stop_id == EOS[0]


@pytest.mark.parametrize(("ignore", "reason"), [(False, "stop"), (True, "length")])
def test_eos_ends_a_row_unless_ignored(ignore: bool, reason: str) -> None:
    batch = Scheduler(capacity(), eos_ids=EOS)
    batch.submit(0, submit([65], greedy(2, ignore_eos=ignore)))
    emitted = []
    for _ in range(2 if ignore else 1):
        emitted += batch.commit(StepResult(step=batch.plan().step, tokens=column([EOS[0]])))
    assert not batch.busy()
    assert emitted[-1].end.reason == reason
    assert [token for emission in emitted for token in emission.tokens] == ([EOS[0]] * 2 if ignore else [])


def test_a_resumed_row_continues_after_what_was_emitted() -> None:
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


def test_a_guide_masks_advances_and_ends_the_row() -> None:
    rig = Rig(capacity(), guides=table_guides)
    rig.submit(submit([65], choice("yes", "no")))
    rig.submit(submit([66], greedy()))
    plan = rig.plan()
    assert [row for row, _ in plan.masks] == [0]
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


def test_a_token_against_the_grammar_is_that_rows_fault() -> None:
    batch = Scheduler(capacity(), guides=table_guides)
    batch.submit(0, submit([65], choice("yes")))
    (emission,) = batch.commit(StepResult(step=batch.plan().step, tokens=column([ord("n")])))
    assert isinstance(emission.end, Fault) and emission.end.code == "engine_fault" and emission.tokens == []
    batch.check()


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
    batch = Scheduler(capacity(num_blocks=16), guides=table_guides)
    with pytest.raises(kind) as caught:
        batch.submit(0, request_)
    assert caught.value.code == code and caught.value.what
    assert not batch.busy() and batch.stats().waiting == 0
    batch.submit(0, submit([65], greedy()))


def test_guided_rows_are_refused_where_no_grammar_is_followed() -> None:
    with pytest.raises(Unsupported):
        Scheduler(capacity()).submit(0, submit([65], choice("yes")))


def test_an_id_is_used_once_at_a_time() -> None:
    batch = Scheduler(capacity())
    batch.submit(0, submit([65], greedy()))
    with pytest.raises(ValueError, match="live"):
        batch.submit(0, submit([65], greedy()))


def test_stats_and_prediction() -> None:
    rig = Rig(capacity(tokens=32, rows=2))
    for length in (10, 40, 5):
        rig.submit(submit([65 + length] * length, greedy()))
    assert rig.batch.predicted_tokens() == 32
    assert (rig.batch.stats().waiting, rig.batch.stats().prefill_tokens) == (3, 55)
    rig.turn()
    stats = rig.batch.stats(1.5)
    assert (stats.running, stats.waiting, stats.steps_total, stats.step_ms) == (2, 1, 1, 1.5)
    assert (stats.prompt_tokens_total, stats.output_tokens_total, stats.free_blocks) == (50, 1, 64 - 2 - 5)
    rig.drain()
    assert rig.batch.stats().output_tokens_total == 24 and rig.batch.predicted_tokens() == 0


def test_most_plans_of_decodes_are_the_one_before_a_token_further(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[bool] = []
    plain = Scheduler._again
    monkeypatch.setattr(Scheduler, "_again", lambda self, flight: repeated.append((plan := plain(self, flight)) is not None) or plan)
    rig = Rig(capacity(num_blocks=64), ahead=True)
    for i in range(3):
        rig.submit(submit([65 + i] * 10, greedy(60)))
    rig.drain()
    rig.verify()
    assert sum(repeated) > 50
    rig.submit(submit([65] * 10, greedy(60)))
    rig.turn()
    rig.submit(submit([66] * 10, greedy(60)))
    repeated.clear()
    assert len(view(rig.plan().slots)) == 2 and not any(repeated), "a newcomer waits for nobody's end"
    rig.drain()
    rig.verify()


def test_the_leaders_share_of_a_step_is_small() -> None:
    """plan + encode + commit at 64 decoding rows take about 0.1 ms of processor time; the bound leaves room for a slow machine."""
    batch = Scheduler(capacity(num_blocks=4096, rows=64, tokens=8192, context=4096, block_size=16))
    for i in range(64):
        batch.submit(i, submit([65 + i] * 50, greedy(4000), credit=UNLIMITED))
    spent = []
    for _ in range(200):
        start = time.thread_time()
        plan = batch.plan()
        encode(plan)
        spent.append(time.thread_time() - start)
        result = StepResult(step=plan.step, tokens=column(np.full(int(view(plan.sample).sum()), 70, dtype=np.int32)))
        start = time.thread_time()
        batch.commit(result)
        spent[-1] += time.thread_time() - start
    assert sorted(spent)[len(spent) // 2] < 1e-3


def test_a_resting_batch_proves_itself_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[int] = []
    monkeypatch.setattr(Scheduler, "check", lambda self: proofs.append(1))
    rig = Rig(capacity())

    def rested() -> int:
        before = len(proofs)
        rig.batch.rest()
        return len(proofs) - before

    for length, proves in ((CHECK_STEPS - 1, False), (1, True), (CHECK_STEPS, True)):
        rig.submit(submit([65], greedy(length)))
        for _ in range(length - 1):
            rig.turn()
        assert rig.batch.busy() and not rested(), "not beside a row"
        rig.drain()
        assert [rested(), rested()] == [proves, False]
