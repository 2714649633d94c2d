"""The request table, alone and through the routing core: states, attempts, tokens and deadlines, and whom a death is blamed on."""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec

from orchestrator.router.core.actions import DeliverCachedTokens, DeliverTokens, FailChoice, FinishChoice, SendMessage
from orchestrator.router.core.choice_state import RequestState
from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.request_table import KEPT_ATTEMPTS, RequestTable
from tests.support.router_core import HELLO, CoreDriver, accept, ask, beat, delivered, join, router, sent, tokens, where
from workers.protocol.errors import DeadlineExceeded, ReplicaLost, Unavailable
from workers.protocol.messages import (
    Accepted,
    Attach,
    Cancel,
    Credit,
    Done,
    Failed,
    SamplingParams,
    Submit,
    Usage,
)


def table() -> tuple[RequestTable, ReplicaRegistry]:
    """A table without a request, and a registry with the replica ``a``."""
    registry = ReplicaRegistry(replica_timeout_s=2.0, hang_floor_s=10.0)
    registry.hello(b"a", "", HELLO, 0.0)
    return RequestTable("R", ["m"], 5.0), registry


def admit(requests: RequestTable, id: int, **change: Any) -> RequestState:
    return requests.admit(SubmitRequest(id=id, request=ask(**change), session=""), 0.0, inf)


def test_a_choice_passes_its_states_and_is_in_one_place_in_each() -> None:
    requests, registry = table()
    replica = registry.replicas["a"]
    (choice,) = admit(requests, 1).choices
    assert choice.phase == "queued" and choice in requests.queues["m"] and not replica.streams
    requests.send(choice, replica, "only", cached=None, expected_s=0.0, now=1.0)
    assert choice.phase == "sent" and choice not in requests.queues["m"] and list(replica.streams) == [choice.stream]
    requests.check(registry)
    requests.on_accepted(replica, choice.stream, choice.attempt_number + 1, 1.1)
    assert choice.phase == "sent", "another attempt was meant"
    requests.on_accepted(replica, choice.stream, choice.attempt_number, 1.1)
    assert choice.phase == "accepted"
    (submit,) = sent(requests.take_actions(), Submit)
    assert requests.on_tokens(replica, tokens("b1", submit, 0, [5]), 1.2) == [choice] and choice.phase == "running"
    requests.requeue(choice, "silent", 2.0, cancel=False)
    assert choice.phase == "queued" and choice.replica is None and choice in requests.queues["m"] and not replica.streams
    requests.check(registry)
    requests.send(choice, replica, "only", cached=None, expected_s=0.0, now=3.0)
    assert choice.attempt_number == 2 and choice.emitted == [5]
    requests.finish(choice, "stop", Usage(prompt_tokens=3, output_tokens=1), None, 4.0)
    assert choice.phase == "ended" and not requests.requests and not requests.streams and len(requests.history) == 1
    requests.check(registry)


def test_the_last_choice_of_a_request_ends_it_whatever_ends_the_others() -> None:
    requests, registry = table()
    finished, failed, cancelled = admit(requests, 1, n=3).choices
    requests.finish(finished, "stop", Usage(prompt_tokens=3, output_tokens=0), None, 1.0)
    requests.fail(failed, DeadlineExceeded("late", "it was queued"), 1.0)
    assert list(requests.requests) == [1]
    requests.check(registry)
    requests.cancel(cancelled, 1.0)
    requests.cancel(cancelled, 1.0)
    assert not requests.requests
    assert [requests.counts[name] for name in ("accepted", "finished", "failed", "cancelled")] == [3, 1, 1, 1]
    assert [type(action) for action in requests.take_actions()] == [FinishChoice, FailChoice], "who cancels is told nothing"
    requests.check(registry)


def test_a_restored_table_is_the_one_that_the_snapshot_was_taken_of() -> None:
    requests, registry = table()
    replica = registry.replicas["a"]
    returned, at_replica, new = (admit(requests, id).choices[0] for id in (1, 2, 3))
    for choice in (returned, at_replica):
        requests.send(choice, replica, "only", cached=None, expected_s=0.0, now=1.0)
    requests.requeue(returned, "refused", 2.0, cancel=False)
    twin = RequestTable("R", ["m"], 5.0)
    twin.restore(requests.snapshot(), registry)
    assert twin.snapshot() == requests.snapshot()
    assert twin.queues["m"].ids() == ([returned.id], [new.id]) and list(twin.streams) == [at_replica.stream]
    twin.check(registry)


def test_choices_get_their_own_seed_and_name() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(n=3, params=SamplingParams(seed=2**63 - 1, max_tokens=8)), 0.0)
    submits = sent(route.take(), Submit)
    assert [submit.task.params.seed for submit in submits] == [2**63 - 1, 0, 1]
    assert [submit.request_id for submit in submits] == ["q/0", "q/1", "q/2"]


def test_a_clients_new_attempt_outranks_every_placement_before() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    route.submit(ask(request_id="again", client_attempt=1), 0.0)
    old, new = sent(route.take(), Submit)
    assert new.attempt > old.attempt + 500


def test_what_is_whole_already_needs_no_replica() -> None:
    """A journal that holds every token: the Done was lost with a router."""
    route = router()
    route.submit(ask(emitted=[[1] * 8]), 0.0)
    (end,) = route.take()
    assert isinstance(end, FinishChoice) and end.reason == "length" and end.usage.output_tokens == 8


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
    assert (again.request_id, again.attempt) == ("q/1", 2), "a choice that is not there is placed again"
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


def test_of_many_attempts_the_first_and_the_last_are_kept() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    for second in range(1, 200):
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", Failed(boot="a1", stream=submit.stream, attempt=submit.attempt, code="not_found", message=""), second / 10)
    (story,) = route.core.stories("q")
    (choice,) = story.choices
    assert len(choice.attempts) == KEPT_ATTEMPTS and choice.dropped_attempts == 200 - KEPT_ATTEMPTS
    assert [attempt.number for attempt in choice.attempts[:2]] == [1, 138] and choice.attempts[-1].number == 200
    route.check()
