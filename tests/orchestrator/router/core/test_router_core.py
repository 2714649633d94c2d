"""The routing core, case by case: admission, choice, failover, limits. Any order of events: tests/property/test_route_any_order.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from orchestrator.router.core.actions import DeliverCachedTokens, DeliverTokens, FailChoice, FinishChoice, SendMessage
from orchestrator.router.core.policy import Candidate, PlacementQuery
from orchestrator.router.core.replica_registry import FAULT_LIMIT
from orchestrator.router.core.stats import PlacementReason
from orchestrator.router.core.wait_estimate import expected_wait_ms
from tests.support.router_core import CoreDriver, accept, ask, beat, delivered, join, router, sent, tokens, where
from workers.protocol.errors import DeadlineExceeded, NotFound, Overloaded, ReplicaLost, Unavailable
from workers.protocol.messages import Accepted, Attach, Bye, Cancel, Credit, Done, Failed, RouterHeartbeat, SamplingParams, Submit, Usage


def burst(route: CoreDriver, count: int) -> list[bytes]:
    """Where ``count`` choices go that have no prefix in common."""
    places = []
    for index in range(count):
        route.submit(ask([index * 7 + 1] * 20), 0.0)
        places += where(route.take())
    return places


def test_unknown_model_full_queue_and_closing_are_refused() -> None:
    route = router()
    with pytest.raises(NotFound) as unknown:
        route.submit(ask(model="x"), 0.0)
    assert unknown.value.code == "model_not_found"
    route.submit(ask(n=2), 0.0)
    with pytest.raises(Overloaded) as full:
        route.submit(ask(), 0.0)
    assert full.value.retry_after == 1.0 and not isinstance(full.value, Unavailable)
    with pytest.raises(DeadlineExceeded):
        route.submit(ask(deadline_s=0.0), 0.0)
    route.stop_accepting()
    with pytest.raises(Unavailable):
        route.submit(ask(), 0.0)
    route.check()


def test_retry_after_follows_the_measured_rate() -> None:
    route = router(max_queue=4)
    join(route, "a", max_batch_size=1)
    for second in range(20):  # one choice ends every 4 s
        route.submit(ask(), second * 4.0)
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", beat(boot="a1"), second * 4.0)
        usage = Usage(prompt_tokens=3, output_tokens=0)
        route.hear(b"a", "", Done(boot="a1", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=usage), second * 4.0 + 1)
    for _ in range(6):  # one runs, one is the lookahead, four wait
        route.submit(ask(), 80.0)
    with pytest.raises(Overloaded) as full:
        route.submit(ask(), 80.0)
    assert full.value.retry_after == pytest.approx(4.0 * 5 / 2, rel=0.2)


def test_choices_get_their_own_seed_and_name() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(n=3, params=SamplingParams(seed=2**63 - 1, max_tokens=8)), 0.0)
    submits = sent(route.take(), Submit)
    assert [submit.task.params.seed for submit in submits] == [2**63 - 1, 0, 1]
    assert [submit.request_id for submit in submits] == ["q/0", "q/1", "q/2"]


def test_a_freed_place_is_filled_at_once_in_order() -> None:
    route = router(max_queue=10)
    join(route, "a", max_batch_size=2)
    for index in range(6):
        route.submit(ask([index + 1]), 0.0)
    submits = sent(route.take(), Submit)
    assert [submit.prompt_ids for submit in submits] == [[1], [2], [3]], "two choices and one of lookahead"
    usage = Usage(prompt_tokens=1, output_tokens=0)
    route.hear(b"a", "", Done(boot="a1", stream=submits[1].stream, attempt=1, reason="stop", usage=usage), 1.0)
    assert [submit.prompt_ids for submit in sent(route.take(), Submit)] == [[4]]


def test_a_lost_replicas_choices_go_on_elsewhere_before_all_others() -> None:
    route = router(max_queue=10)
    join(route, "a", max_batch_size=2)
    for index in range(5):
        route.submit(ask([index + 1]), 0.0)
    submits = sent(route.take(), Submit)
    route.hear(b"a", "", tokens("a1", submits[0], 0, [10, 11]), 0.5)
    assert delivered(route) == [(0, [10, 11])]
    route.tick(3.0)
    route.take()
    join(route, "b", max_batch_size=4, now=3.0)
    moved = sent(route.take(), Submit)
    assert [submit.prompt_ids for submit in moved] == [[1], [2], [3], [4], [5]]
    assert moved[0].task.emitted == [10, 11] and moved[0].attempt == 2 and moved[0].task.params.max_tokens == 8
    route.hear(b"a", "", tokens("a1", submits[0], 2, [99]), 3.1)
    late = route.take()
    assert not [action for action in late if isinstance(action, DeliverTokens)] and route.counts["stale_tokens"] == 1
    assert [message.stream for message in sent(late, Cancel)] == [submits[0].stream], "it is told to stop"
    route.check()


def test_a_request_that_outlives_no_replica_is_failed() -> None:
    route = router(replica_limit=2)
    join(route, "a")
    join(route, "b")
    route.submit(ask(), 0.0)
    for now in (3.0, 6.0):
        actions = route.take()
        (first,) = where(actions)
        accept(route, *sent(actions, Submit), place=first.decode())
        route.hear(b"b" if first == b"a" else b"a", "", beat(boot="b1" if first == b"a" else "a1"), now)
        route.unreachable(first, now)
    (end,) = [action for action in route.take() if isinstance(action, FailChoice)]
    assert isinstance(end.error, ReplicaLost) and end.error.code == "replica_limit"
    route.check()


def run_on(route: CoreDriver, submit: Submit, boot: str, count: int, now: float) -> None:
    """The replica ``boot`` gives ``count`` more tokens for a placement."""
    route.hear(boot[0].encode(), "", tokens(boot, submit, len(submit.task.emitted), list(range(count))), now)


def lose_with(route: CoreDriver, name: str, now: float) -> list[Submit]:
    """Replica ``name`` dies; what it ran is submitted elsewhere."""
    route.unreachable(name.encode(), now)
    return sent(route.take(), Submit)


def test_a_choice_that_got_on_is_not_what_ended_its_replicas() -> None:
    route = router(replica_limit=2)
    join(route, "a")
    route.submit(ask(params=SamplingParams(seed=7, max_tokens=100)), 0.0)
    (submit,) = sent(route.take(), Submit)
    for death in range(1, 6):
        run_on(route, submit, "abcdef"[death - 1] + "1", 5, death)
        route.take()
        join(route, "abcdef"[death], now=death)
        (submit,) = lose_with(route, "abcdef"[death - 1], death)
        assert len(submit.task.emitted) == 5 * death
    run_on(route, submit, "f1", 4, 6.0)
    route.take()
    assert lose_with(route, "f", 6.0) == [], "no further than where the last one died"
    assert route.live == 0
    route.check()


def test_of_all_that_saw_two_deaths_those_are_failed_that_never_gave_a_token() -> None:
    route = router(replica_limit=2)
    join(route, "a")
    for prompt in ([1], [2], [3]):
        route.submit(ask(prompt, params=SamplingParams(seed=7, max_tokens=100)), 0.0)
    mate, poison, other = sent(route.take(), Submit)
    accept(route, poison, place="a")
    for submit in (mate, other):
        run_on(route, submit, "a1", 50, 0.5)
    route.take()
    join(route, "b", now=1.0)
    moved = lose_with(route, "a", 1.0)
    assert [submit.prompt_ids for submit in moved] == [mate.prompt_ids, poison.prompt_ids, other.prompt_ids]
    accept(route, *moved, place="b")
    join(route, "c", now=2.0)
    route.take()
    route.unreachable(b"b", 2.0)
    actions = route.take()
    assert [action.error.code for action in actions if isinstance(action, FailChoice)] == ["replica_limit"]
    assert [submit.prompt_ids for submit in sent(actions, Submit)] == [mate.prompt_ids, other.prompt_ids]
    route.check()


def test_replicas_that_die_together_are_nobodys_doing() -> None:
    route = router(replica_limit=2)
    join(route, "a")
    join(route, "b")
    route.submit(ask(), 0.0)
    actions = route.take()
    (first,) = where(actions)
    accept(route, *sent(actions, Submit), place=first.decode())
    other = {b"a": b"b", b"b": b"a"}[first]
    route.unreachable(first, 1.0)
    route.unreachable(other, 1.0)
    assert not [action for action in route.take() if isinstance(action, FailChoice)]
    join(route, "c", now=2.0)
    assert where(route.take()) == [b"c"], "it waits for the next one"
    route.check()


def test_admission_counts_no_places_of_a_quarantined_replica() -> None:
    """A choice is not sent there while another replica is ready, so it would wait in the queue above its bound."""
    route = router(max_queue=2)
    join(route, "a")
    for _ in range(FAULT_LIMIT):
        route.submit(ask(), 0.0)
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", Failed(boot="a1", stream=submit.stream, attempt=1, code="nan_logits", message=""), 0.0)
    join(route, "b", max_batch_size=1)
    assert route.registry.replicas["a"].quarantined and route.registry.replicas["a"].free_places > 2
    route.submit(ask(n=2), 1.0)
    assert where(route.take()) == [b"b", b"b"], "one place and one of lookahead"
    with pytest.raises(Overloaded):
        route.submit(ask(n=3), 1.0)
    route.submit(ask(n=2), 1.0)
    assert where(route.take()) == [] and route.core.waiting("m") == 2
    route.check()


def test_logits_that_are_not_finite_cost_a_replica_the_choice_for_a_while() -> None:
    route = router(max_queue=8)
    join(route, "a")
    join(route, "b")

    def places(count: int, now: float) -> set[bytes]:
        for _ in range(count):
            route.submit(ask(), now)
        actions = route.take()
        for submit, place in zip(sent(actions, Submit), where(actions), strict=True):
            code = "nan_logits" if place == b"a" and now < 50 else "engine_fault"
            end = Failed(boot=f"{place.decode()}1", stream=submit.stream, attempt=1, code=code, message="")
            route.hear(place, "", end, now)
        assert [type(action) for action in route.take()] == [FailChoice] * count
        return set(where(actions))

    def live(now: float) -> None:
        for name in "ab":
            route.hear(name.encode(), "", beat(boot=f"{name}1"), now)
        route.tick(now)
        route.take()

    for second in range(3):
        live(float(second))
        places(2, float(second))
    assert route.counts["quarantines"] == 1 and route.registry.replicas["a"].quarantined
    assert places(4, 50.0) == {b"b"}
    route.unreachable(b"b", 51.0)
    route.submit(ask(), 51.0)
    assert where(route.take()) == [b"a"], "it is the last one"
    live(62.5)
    assert not route.registry.replicas["a"].quarantined
    route.check()


def test_drained_choices_move_without_blame() -> None:
    route = router(replica_limit=1)
    join(route, "a")
    join(route, "b")
    route.submit(ask(), 0.0)
    actions = route.take()
    (submit,), (place,) = sent(actions, Submit), where(actions)
    name = place.decode()
    route.hear(place, "", Failed(boot=f"{name}1", stream=submit.stream, attempt=1, code="replica_lost", message=""), 1.0)
    (other,) = where(route.take())
    assert other != place
    route.hear(other, "", Bye(boot="", reason="drained"), 1.1)
    assert where(route.take()) == [], "the first one refuses until it is heard again"
    route.hear(place, "", beat(boot=f"{name}1"), 1.2)
    assert where(route.take()) == [place]


def test_a_gap_is_asked_for_again_and_a_repeat_dropped() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    (submit,) = sent(route.take(), Submit)
    route.hear(b"a", "", Accepted(boot="a1", stream=submit.stream, attempt=1), 0.1)
    route.hear(b"a", "", tokens("a1", submit, 0, [1, 2]), 0.1)
    route.hear(b"a", "", tokens("a1", submit, 1, [2, 3]), 0.1)
    assert delivered(route) == [(0, [1, 2]), (2, [3])]
    route.hear(b"a", "", tokens("a1", submit, 5, [6]), 0.2)
    (attach,) = sent(route.take(), Attach)
    assert attach.have == 3 and attach.stream != submit.stream and attach.attempt == 1
    route.hear(b"a", "", tokens("a1", attach, 3, [4, 5, 6]), 0.3)
    assert delivered(route) == [(3, [4, 5, 6])]
    assert (route.counts["gaps"], route.counts["duplicate_tokens"]) == (1, 1)


def test_a_prefix_hit_is_told_before_the_first_token_of_each_placement() -> None:
    route = router()
    join(route, "a")
    owner = route.submit(ask(), 0.0)
    (submit,) = sent(route.take(), Submit)
    hit = msgspec.structs.replace(tokens("a1", submit, 0, [1]), cached=[(submit.stream, 2), (submit.stream + 1, 9)])
    route.hear(b"a", "", hit, 0.1)
    found = [action for action in route.take() if isinstance(action, DeliverCachedTokens | DeliverTokens)]
    assert found[0] == DeliverCachedTokens(owner, 0, 2) and isinstance(found[1], DeliverTokens) and len(found) == 2
    route.hear(b"a", "", msgspec.structs.replace(hit, firsts=[1]), 0.2)
    assert not [action for action in route.take() if isinstance(action, DeliverCachedTokens)], "an attach repeats it"
    route.unreachable(b"a", 0.3)
    join(route, "b")
    (again,) = sent(route.take(), Submit)
    route.hear(b"b", "", msgspec.structs.replace(tokens("b1", again, 2, [3]), cached=[(again.stream, 1)]), 0.4)
    assert [action.cached_tokens for action in route.take() if isinstance(action, DeliverCachedTokens)] == [1]
    route.check()


def test_a_prompt_that_is_only_scored_goes_to_a_replica() -> None:
    """``max_tokens`` 0 is no answer whose end was lost."""
    route = router()
    join(route, "a")
    route.submit(ask(params=SamplingParams(max_tokens=0, prompt_logprobs=1)), 0.0)
    (submit,) = sent(route.take(), Submit)
    usage = Usage(prompt_tokens=3, output_tokens=0)
    route.hear(b"a", "", Done(boot="a1", stream=submit.stream, attempt=1, reason="length", usage=usage), 1.0)
    (end,) = [action for action in route.take() if isinstance(action, FinishChoice)]
    assert (end.reason, end.usage) == ("length", usage)
    route.check()


def test_a_done_without_its_tokens_is_not_believed() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    for attempt in (1, 2):
        (submit,) = sent(route.take(), Submit)
        assert submit.attempt == attempt
        usage = Usage(prompt_tokens=3, output_tokens=8)
        route.hear(b"a", "", Done(boot="a1", stream=submit.stream, attempt=attempt, reason="length", usage=usage), 1.0)
    (end,) = [action for action in route.take() if isinstance(action, FailChoice)]
    assert end.error.code == "engine_fault", "twice is a replica that cannot count, not a lost message"
    route.check()


def test_a_silent_reconnect_asks_for_every_choice_again() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(n=2), 0.0)
    submits = sent(route.take(), Submit)
    route.hear(b"a", "", tokens("a1", submits[0], 0, [1, 2]), 0.1)
    route.take()
    route.hear(b"another address", "", beat(boot="a1"), 0.2)
    attaches = [action for action in route.take() if isinstance(action, SendMessage) and isinstance(action.message, Attach)]
    assert [(action.peer, action.message.request_id, action.message.have) for action in attaches] == [
        (b"another address", "q/0", 2),
        (b"another address", "q/1", 0),
    ]
    attach = attaches[1].message
    route.hear(b"another address", "", Failed(boot="a1", stream=attach.stream, attempt=1, code="not_found", message=""), 0.3)
    (again,) = sent(route.take(), Submit)
    assert (again.request_id, again.attempt) == ("q/1", 2), "a choice that is not there is placed anew"
    route.check()


def test_leaving_frees_the_choices_at_the_replica() -> None:
    route = router()
    join(route, "a")
    id = route.submit(ask(n=2), 0.0)
    submits = sent(route.take(), Submit)
    route.stop_choice(id, 0, 1.0)
    assert [message.stream for message in sent(route.take(), Cancel)] == [submits[0].stream]
    route.cancel(id, 1.0)
    actions = route.take()
    assert [message.stream for message in sent(actions, Cancel)] == [submits[1].stream]
    assert len(actions) == 1 and route.live == 0, "nobody is told of an end that was asked for"
    route.check()


def test_deadlines_hold_in_the_queue_and_at_a_replica() -> None:
    route = router()
    queued = route.submit(ask(deadline_s=1.0), 0.0)
    patient = route.submit(ask(), 0.0)
    route.tick(1.0)
    (end,) = route.take()
    assert isinstance(end, FailChoice) and end.owner == queued and isinstance(end.error, DeadlineExceeded)
    route.tick(5.0)
    (end,) = route.take()
    assert isinstance(end, FailChoice) and end.owner == patient and isinstance(end.error, Unavailable) and end.error.retry_after
    join(route, "a", now=6.0)
    route.submit(ask(deadline_s=1.0), 6.0)
    (submit,) = sent(route.take(), Submit)
    assert submit.deadline_ms == 1000
    route.tick(7.0)
    assert len(sent(route.take(), Cancel)) == 1 and route.live == 0


def test_a_choice_that_lost_its_replica_waits_no_longer_than_a_new_one() -> None:
    route = router(request_timeout_s=0.0)
    join(route, "a")
    route.submit(ask(), 0.0)
    route.unreachable(b"a", 50.0)
    route.tick(54.9)
    assert route.live == 1
    route.tick(55.0)
    (end,) = [action for action in route.take() if isinstance(action, FailChoice)]
    assert isinstance(end.error, Unavailable)


def test_a_submit_that_nobody_acknowledges_is_sent_again() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    (first,) = sent(route.take(), Submit)
    for now in (1.0, 2.0, 3.0, 4.0, 5.0):
        route.hear(b"a", "", beat(boot="a1"), now)
        route.tick(now)
    actions = route.take()
    (second,) = sent(actions, Submit)
    assert second.attempt == first.attempt + 1 and [c.stream for c in sent(actions, Cancel)] == [first.stream]


def test_stale_hellos_are_told_to_leave_and_strangers_to_greet() -> None:
    route = router()
    join(route, "a", epoch=2)
    route.take()
    join(route, "a", epoch=1)
    (bye,) = sent(route.take(), Bye)
    assert bye.reason == "stale"
    route.hear(b"x", "", beat(boot="unknown"), 0.0)
    (peers,) = sent(route.take(), RouterHeartbeat)
    assert peers.boot == "R"


def test_what_is_whole_already_needs_no_replica() -> None:
    """A journal that holds every token: the Done was lost with a router."""
    route = router()
    route.submit(ask(emitted=[[1] * 8]), 0.0)
    (end,) = route.take()
    assert isinstance(end, FinishChoice) and end.reason == "length" and end.usage.output_tokens == 8


def test_a_clients_new_attempt_outranks_every_placement_before() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    route.submit(ask(request_id="again", client_attempt=1), 0.0)
    old, new = sent(route.take(), Submit)
    assert new.attempt > old.attempt + 500


def test_prefixes_attract_until_the_wait_is_longer() -> None:
    route = router(max_queue=100)
    choices = {b"a": 0, b"b": 0}
    for peer in choices:
        join(route, peer.decode(), max_batch_size=32)
    route.take()
    shared = list(range(1, 321))
    places = []
    for index in range(40):
        route.submit(ask([*shared, 400 + index]), 0.0)
        actions = route.take()
        (place,), (submit,) = where(actions), sent(actions, Submit)
        places.append(place)
        choices[place] += 1
        boot = f"{place.decode()}1"
        route.hear(place, "", Accepted(boot=boot, stream=submit.stream, attempt=1), 0.0)
        for peer, running in choices.items():  # the prefill is over by the next request
            route.hear(peer, "", beat(boot=f"{peer.decode()}1", step_ms=10.0, running=running), 0.0)
    assert places[0] == places[1] == places[2], "a cached prefix attracts"
    assert 10 <= places.count(b"a") <= 30, "and does not make a hot spot"


def test_without_a_cache_no_prefix_attracts() -> None:
    route = router(max_queue=100)
    for name in ("a", "b"):
        join(route, name, max_batch_size=32, prefix_cache=False)
    route.take()
    shared = list(range(1, 321))
    places = []
    for index in range(20):
        route.submit(ask([*shared, 400 + index]), 0.0)
        places += where(route.take())
    assert places.count(b"a") == places.count(b"b") == 10


def test_without_a_shared_prefix_choices_spread_evenly() -> None:
    route = router(max_queue=100)
    for name in ("a", "b"):
        join(route, name, max_batch_size=32)
    route.take()
    places = burst(route, 20)
    assert places.count(b"a") == places.count(b"b") == 10


def test_a_burst_spreads_evenly_whatever_the_last_steps_of_equals_were() -> None:
    """At a burst's begin one replica's heartbeat tells of a prefill, another's still of single tokens: twenty times apart."""
    route = router(max_queue=400)
    for name, step_ms in (("a", 180.0), ("b", 9.0), ("c", 8.0)):
        join(route, name, max_batch_size=128)
        route.hear(name.encode(), "", beat(boot=f"{name}1", step_ms=step_ms), 0.0)
    route.take()
    places = burst(route, 300)
    assert {name: places.count(name) for name in (b"a", b"b", b"c")} == {b"a": 100, b"b": 100, b"c": 100}


def test_a_choice_counts_as_waiting_until_its_first_token_whatever_a_heartbeat_says() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=32)
    route.submit(ask(list(range(1, 41))), 0.0)
    (submit,) = sent(route.take(), Submit)
    replica = route.registry.replicas["a"]
    accept(route, submit, place="a")
    route.hear(b"a", "", beat(boot="a1", step=1, running=0, prefill_tokens=0), 0.1)  # as of the step before it
    assert replica.queued_tokens == 40
    route.hear(b"a", "", beat(boot="a1", step=1, running=1, prefill_tokens=10), 0.1)  # the first chunk of it is computed
    assert replica.queued_tokens == 10
    route.hear(b"a", "", tokens("a1", submit, 0, [65]), 0.2)
    assert replica.queued_tokens == 0
    route.hear(b"a", "", beat(boot="a1", step=1, running=1, prefill_tokens=40), 0.3)  # nor is it counted twice
    assert replica.queued_tokens == 0
    route.check()


def test_replicas_of_another_kind_are_chosen_by_their_pace() -> None:
    route = router(max_queue=400)
    for name, step_ms, tp in (("a", 10.0, 2), ("b", 20.0, 1)):
        join(route, name, max_batch_size=128, max_num_tokens=2048, tp=tp)
        route.hear(name.encode(), "", beat(boot=f"{name}1", step_ms=step_ms), 0.0)
    route.take()
    places = burst(route, 120)
    assert 75 <= places.count(b"a") <= 85, "two thirds go to the one that is twice as fast"


def test_expected_wait_counts_prefill_neighbours_and_a_full_batch() -> None:
    base: dict[str, Any] = {
        "step_ms": 10.0, "occupancy": 0, "max_batch_size": 8, "step_tokens": 100, "queued_tokens": 0, "known_tokens": 200,
        "cached_tokens": 0, "choice_ms": 800.0, "output_tokens": 50.0,
    }  # fmt: skip
    assert expected_wait_ms(**base) == 20.0
    assert expected_wait_ms(**base | {"cached_tokens": 100}) == 10.0
    assert expected_wait_ms(**base | {"queued_tokens": 300}) == 50.0
    assert expected_wait_ms(**base | {"occupancy": 8}) == pytest.approx(10.0 * (200 / 92 + 50 * 8 / 100) + 100.0)


def test_a_choice_whose_client_takes_nothing_holds_no_place() -> None:
    """Slow readers must not keep others out: a choice without credit leaves its place to the next, up to a multiple of the batch."""
    route = router(max_queue=100)
    join(route, "a", max_batch_size=2)
    slow = [route.submit(ask([index + 1], credit=2), 0.0) for index in range(3)]
    held = sent(route.take(), Submit)
    assert len(held) == 3, "two run, one is the lookahead"
    route.submit(ask([9]), 0.0)
    assert where(route.take()) == []
    route.hear(b"a", "", tokens("a1", held[0], 0, [65, 66]), 0.0)
    assert [submit.prompt_ids for submit in sent(route.take(), Submit)] == [[9]]
    route.check()
    # Credit gives it its place back, though nobody is put out for it.
    route.credit(slow[0], 4)
    assert [message.tokens for message in sent(route.take(), Credit)] == [[4]]
    route.check()
    for submit in held[1:]:
        route.hear(b"a", "", tokens("a1", submit, 0, [65, 66]), 0.0)
    for index in range(20):
        route.submit(ask([20 + index], credit=1), 0.0)
        for submit in sent(route.take(), Submit):
            route.hear(b"a", "", tokens("a1", submit, 0, [65]), 0.0)
    assert route.placed == 8 * 2, "as many as the leader may be asked to remember"
    route.check()
    route.unreachable(b"a", 1.0)
    route.check()
    join(route, "b", max_batch_size=2)
    route.check()
    assert route.placed == 8 * 2


class FirstPlace:
    """A policy that takes the first candidate, keeps one model waiting, and remembers what the core reports to it."""

    name = "first_place"

    def __init__(self) -> None:
        self.waits = False
        self.seen: list[tuple[Any, ...]] = []

    def choose(self, query: PlacementQuery, candidates: Sequence[Candidate]) -> tuple[int, PlacementReason] | None:
        self.seen.append(("choose", query.known_tokens, query.cached_tokens, [candidate.name for candidate in candidates]))
        return None if self.waits else (0, "load")

    def on_sent(self, query: PlacementQuery, replica: str) -> None:
        self.seen.append(("sent", query.known_tokens, replica))

    def on_first_token(self, replica: str, wait_s: float) -> None:
        self.seen.append(("first token", replica, wait_s))

    def on_end(self, replica: str, output_tokens: int) -> None:
        self.seen.append(("end", replica, output_tokens))


def test_the_policy_that_is_given_decides_and_hears_what_came_of_it() -> None:
    policy = FirstPlace()
    route = router(policy=policy)
    join(route, "a")
    join(route, "b")
    route.take()
    route.submit(ask(), 1.0)
    (submit,) = sent(route.take(), Submit)
    route.hear(b"a", "", tokens("a1", submit, 0, [5]), 1.5)
    route.hear(b"a", "", tokens("a1", submit, 1, [6]), 1.75)
    usage = Usage(prompt_tokens=3, output_tokens=2)
    route.hear(b"a", "", Done(boot="a1", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=usage), 2.0)
    assert policy.seen == [("choose", 3, [0, 0], ["a", "b"]), ("sent", 3, "a"), ("first token", "a", 0.5), ("end", "a", 2)]
    policy.waits = True
    route.submit(ask(), 3.0)
    assert sent(route.take(), Submit) == [] and route.core.waiting("m") == 1, "it waits though there is room"
    policy.waits = False
    route.tick(3.1)
    assert where(route.take()) == [b"a"]
    route.check()
