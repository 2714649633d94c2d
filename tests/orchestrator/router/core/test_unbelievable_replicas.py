"""Routers check what replicas send: invalid data about a choice reaches no client, and the choice continues at another replica."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.router.core.actions import DeliverCachedTokens, DeliverPromptLogprobs, DeliverTokens, FailChoice, FinishChoice
from tests.support.examples import examples
from tests.support.router_core import CAPACITY, CoreDriver, accept, ask, beat, delivered, join, router, sent, tokens, where
from workers.protocol.messages import Accepted, Attach, Cancel, Done, Failed, Logprobs, SamplingParams, Submit, Tokens, Usage

VOCAB = CAPACITY.vocab_size


def placed(**change: Any) -> tuple[CoreDriver, Submit]:
    """A core with the replicas a and b, and a request of 8 tokens that runs at a."""
    route = router()
    join(route, "a")
    route.submit(ask(**change), 0.0)
    (submit,) = sent(route.take(), Submit)
    accept(route, submit, place="a")
    join(route, "b")
    return route, submit


def moved(route: CoreDriver) -> Submit:
    """The Submit with which the choice goes on at b; nothing was delivered, and a is in quarantine."""
    actions = route.take()
    assert where(actions) == [b"b"] and len(sent(actions, Cancel)) == 1
    assert not [action for action in actions if isinstance(action, FailChoice | FinishChoice | DeliverPromptLogprobs)]
    assert route.registry.replicas["a"].quarantined and not route.registry.replicas["b"].quarantined
    route.check()
    (again,) = sent(actions, Submit)
    assert isinstance(again, Submit)
    return again


@pytest.mark.parametrize("ids", [[VOCAB], [2**31 - 1], [5, 6, VOCAB], [VOCAB, 5], [1] * 7])
def test_ids_that_no_model_gives_and_tokens_beyond_the_limit_are_not_delivered(ids: list[int]) -> None:
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 0, [7, 8]), 0.1)
    assert delivered(route) == [(0, [7, 8])]
    route.hear(b"a", "", tokens("a1", submit, 2, ids), 0.2)
    assert moved(route).task.emitted == [7, 8]
    assert route.counts["invalid"] == route.counts["quarantines"] == 1


@pytest.mark.parametrize(
    "scores",
    [
        [Logprobs(8, -0.1, [], [])],  # another token's
        [Logprobs(7, -0.1, [], []), Logprobs(7, -0.1, [], [])],
        [],
        [Logprobs(7, -0.1, [VOCAB], [-0.1])],
        [Logprobs(7, -0.1, [-1], [-0.1])],
        [Logprobs(7, -0.1, [1, 2], [-0.1])],
    ],
)
def test_logprobs_are_those_of_the_tokens(scores: list[Logprobs]) -> None:
    route, submit = placed()
    route.hear(b"a", "", msgspec.structs.replace(tokens("a1", submit, 0, [7]), logprobs=[scores]), 0.1)
    assert moved(route).task.emitted == []


@pytest.mark.parametrize("count", [1, 2, 4])
def test_logprobs_of_a_prompt_are_as_long_as_the_prompt(count: int) -> None:
    route, submit = placed()
    scores = [Logprobs(1, None, [], [])] * count
    route.hear(b"a", "", Tokens(boot="a1", streams=[], attempts=[], firsts=[], tokens=[], prompt_logprobs=[(submit.stream, scores)]), 0.1)
    moved(route)


@pytest.mark.parametrize("count", [-1, 0, 4, 10**12])
def test_more_cached_tokens_than_there_are_are_not_told(count: int) -> None:
    route, submit = placed()
    cached = msgspec.structs.replace(tokens("a1", submit, 0, [7]), cached=[(submit.stream, count)])
    route.hear(b"a", "", cached, 0.1)
    assert not [action for action in route.take() if isinstance(action, DeliverCachedTokens)]


@pytest.mark.parametrize(("reason", "counted"), [("stop", 1), ("length", 0), ("cancelled", 2)])
def test_an_end_that_contradicts_its_tokens_is_no_end(reason: Any, counted: int) -> None:
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 0, [7, 8]), 0.1)
    delivered(route)
    end = Done(boot="a1", stream=submit.stream, attempt=1, reason=reason, usage=Usage(prompt_tokens=3, output_tokens=counted))
    route.hear(b"a", "", end, 0.2)
    assert moved(route).task.emitted == [7, 8]


def test_the_router_counts_what_a_request_is_charged_for() -> None:
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 0, [7, 8]), 0.1)
    usage = Usage(prompt_tokens=10**9, output_tokens=2, cached_tokens=10**9)
    route.hear(b"a", "", Done(boot="a1", stream=submit.stream, attempt=1, reason="stop", usage=usage), 0.2)
    (end,) = [action for action in route.take() if isinstance(action, FinishChoice)]
    assert end.usage == Usage(prompt_tokens=3, output_tokens=2, cached_tokens=5)


def test_a_gap_that_comes_again_is_not_asked_for_for_ever() -> None:
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 1, [8]), 0.1)
    (attach,) = sent(route.take(), Attach)
    route.hear(b"a", "", Accepted(boot="a1", stream=attach.stream, attempt=1), 0.2)
    route.hear(b"a", "", tokens("a1", attach, 1, [8]), 0.2)
    moved(route)


def test_a_gap_that_the_replica_does_not_mend_costs_little_more_than_a_second() -> None:
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 1, [8]), 10.0)
    assert len(sent(route.take(), Attach)) == 1
    for now in (10.5, 10.9, 11.1):
        for name in "ab":
            route.hear(name.encode(), "", beat(boot=f"{name}1", running=1), now)
        route.tick(now)
    assert where(route.take()) != [], "it went on by then"


def run(route: CoreDriver, begin: float, end: float, **stats: int) -> None:
    """Both replicas beat and time passes, a tick each quarter of a second."""
    now = begin
    while now < end:
        step = 3 + int(now * 4) if stats.get("running") else 3
        route.hear(b"a", "", beat(boot="a1", step=step, **stats), now)
        route.hear(b"b", "", beat(boot="b1", step=3), now)
        route.tick(now)
        now += 0.25


@pytest.mark.parametrize("begun", [[], [7, 8], [7] * 8], ids=["no token", "some tokens", "all tokens and no end"])
@pytest.mark.parametrize("stats", [{"running": 0}, {"running": 1}, {"waiting": 1}, {"running": 1, "prefill_tokens": 0, "waiting": 0}])
def test_a_choice_that_does_not_get_on_is_asked_for_then_moved(begun: list[int], stats: dict[str, int]) -> None:
    """Whatever its heartbeats say: nothing is ahead of the choice, so it must make progress within the hang bound, 10 s."""
    route, submit = placed()
    route.hear(b"a", "", tokens("a1", submit, 0, begun), 0.1)
    route.take()
    run(route, 0.25, 5.0, **stats)
    assert not sent(route.take(), Submit | Attach)
    run(route, 5.0, 6.0, **stats)
    (attach,) = sent(route.take(), Attach)
    assert attach.have == len(begun)
    route.hear(b"a", "", Accepted(boot="a1", stream=attach.stream, attempt=1), 6.0)
    run(route, 6.0, 10.0, **stats)
    assert route.take() == []
    run(route, 10.0, 11.5, **stats)
    actions = route.take()
    assert route.registry.replicas["a"].quarantined and route.counts["stalled"] == 1
    if len(begun) == 8:
        (end,) = [action for action in actions if isinstance(action, FinishChoice)]
        assert end.reason == "length" and end.usage.output_tokens == 8
    else:
        assert where(actions) == [b"b"]
    route.check()


def test_a_replica_that_says_that_it_lost_a_choice_is_believed_and_kept() -> None:
    route, _ = placed()
    run(route, 0.25, 6.0)
    (attach,) = sent(route.take(), Attach)
    route.hear(b"a", "", Failed(boot="a1", stream=attach.stream, attempt=1, code="not_found", message=""), 6.0)
    assert sent(route.take(), Submit) and not route.registry.replicas["a"].quarantined


@pytest.mark.parametrize("why", ["queue", "prompt", "step", "paused"])
def test_a_choice_that_has_to_wait_is_left_in_peace(why: str) -> None:
    """Others are before it; its own prompt is long; one step is long; its client takes nothing."""
    route, submit = placed(credit=2)
    if why == "paused":
        route.hear(b"a", "", tokens("a1", submit, 0, [7, 8]), 0.1)
    route.take()
    now = 0.25
    while now < 60.0:
        stats: dict[str, Any] = {
            "queue": {"step": int(now * 10), "running": 4, "waiting": 1},
            "prompt": {"step": int(now * 10), "running": 1, "prefill_tokens": 5},
            "step": {"step": 3, "running": 1, "busy_ms": now * 1000.0, "predicted_ms": 20_000.0},
            "paused": {},
        }[why]
        route.hear(b"a", "", beat(boot="a1", **stats), now)
        route.hear(b"b", "", beat(boot="b1"), now)
        route.tick(now)
        now += 0.25
    assert route.take() == [] and not route.registry.replicas["a"].quarantined


def test_a_lone_liar_is_tried_as_often_as_a_replica_may_die_of_a_request() -> None:
    route = router(replica_limit=2)
    join(route, "a")
    route.submit(ask(), 0.0)
    for attempt in (1, 2):
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", msgspec.structs.replace(tokens("a1", submit, 0, [VOCAB]), attempts=[attempt]), 0.1)
    (end,) = [action for action in route.take() if isinstance(action, FailChoice)]
    assert end.error.code == "engine_fault" and "2 attempts" in str(end.error) and "none of 320 ids" in str(end.error)
    route.check()


ids = st.integers(0, VOCAB + 3)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["tokens", "done", "accepted"]), st.integers(-2, 9), st.lists(ids, max_size=5)), max_size=12))
def test_whatever_a_replica_sends_a_client_gets_ids_in_order_within_the_limit(said: list[tuple[str, int, list[int]]]) -> None:
    route = router(replica_limit=1000)
    join(route, "a")
    route.submit(ask(params=SamplingParams(seed=7, max_tokens=6)), 0.0)
    got: list[int] = []
    stream = attempt = ends = 0

    def look() -> None:
        """Take what the core asked for."""
        nonlocal stream, attempt, ends
        for action in route.take():
            if isinstance(action, DeliverTokens):
                for _, _, first, new, _ in action.deliveries:
                    assert first == len(got)
                    got.extend(new)
            ends += isinstance(action, FinishChoice | FailChoice)
            for message in sent([action], Submit | Attach):
                stream, attempt = message.stream, message.attempt

    for step, (kind, number, ids) in enumerate(said):
        look()
        usage = Usage(prompt_tokens=3, output_tokens=max(0, number))
        messages: dict[str, Tokens | Done | Accepted] = {
            "tokens": Tokens(boot="a1", streams=[stream], attempts=[attempt], firsts=[number], tokens=[ids]),
            "done": Done(boot="a1", stream=stream, attempt=attempt, reason="stop", usage=usage),
            "accepted": Accepted(boot="a1", stream=stream, attempt=attempt),
        }
        route.hear(b"a", "", messages[kind], step / 10)
        route.check()
    look()
    assert len(got) <= 6 and all(0 <= id < VOCAB for id in got) and ends <= 1
