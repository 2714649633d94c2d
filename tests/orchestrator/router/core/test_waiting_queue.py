"""The queue of a model: its order, alone and through the routing core, and how long a choice may wait in it."""

from __future__ import annotations

from math import inf

import msgspec
import pytest

from orchestrator.router.core.actions import DeliverTokens, FailChoice
from orchestrator.router.core.choice_state import ChoiceState, RequestState
from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.fair_order import CACHED_PRICE, OUTPUT_PRICE, PROMPT_PRICE
from orchestrator.router.core.waiting_queue import WaitingQueue
from tests.support.router_core import ask, delivered, join, router, sent, tokens
from workers.protocol.errors import Unavailable
from workers.protocol.messages import (
    Cancel,
    Done,
    Submit,
    Usage,
)


def waiting(queue: WaitingQueue, id: int, queued_at: float) -> ChoiceState:
    """A choice that came to ``queue`` at ``queued_at``."""
    account = queue.order.open("t", 1.0, 1)
    request = RequestState(SubmitRequest(id=id, request=ask(), session=""), account, queued_at, inf)
    return ChoiceState(request, id, 0, request.spec.params, [])


def drained(queue: WaitingQueue) -> list[int]:
    """The ids of all choices in the order in which they leave."""
    ids = []
    while (choice := queue.first(0.0)) is not None:
        ids.append(choice.id)
        queue.send(choice, 0.0)
        queue.check()
    return ids


def test_a_queue_is_first_come_first_served() -> None:
    queue = WaitingQueue()
    assert queue.first(0.0) is None and len(queue) == 0
    for id in (3, 1, 2):
        queue.push(waiting(queue, id, 0.0))
    assert len(queue) == 3 and drained(queue) == [3, 1, 2] and len(queue) == 0


def test_choices_that_lost_their_replica_leave_before_all_new_ones() -> None:
    queue = WaitingQueue()
    queue.push(waiting(queue, 1, 0.0))
    queue.push_returned(waiting(queue, 9, 5.0))
    queue.push(waiting(queue, 2, 6.0))
    queue.push_returned(waiting(queue, 8, 7.0))
    assert queue.ids() == ([9, 8], [1, 2])
    assert drained(queue) == [9, 8, 1, 2]


def test_any_choice_can_leave_the_queue_from_its_middle() -> None:
    queue = WaitingQueue()
    new, returned = [waiting(queue, id, 0.0) for id in (1, 2, 3)], [waiting(queue, id, 0.0) for id in (4, 5, 6)]
    for choice in new:
        queue.push(choice)
    for choice in returned:
        queue.push_returned(choice)
    queue.remove(new[1])
    queue.remove(returned[1])
    assert new[1] not in queue and returned[1] not in queue and new[0] in queue and returned[2] in queue
    assert drained(queue) == [4, 6, 1, 3]
    with pytest.raises(KeyError):
        queue.remove(new[1])


def test_those_that_wait_too_long_are_found_in_both_groups() -> None:
    queue = WaitingQueue()
    for id, queued_at in ((1, 1.0), (2, 2.0), (3, 3.0)):
        queue.push(waiting(queue, id, queued_at))
    for id, queued_at in ((4, 1.5), (5, 2.5)):
        queue.push_returned(waiting(queue, id, queued_at))
    assert [choice.id for choice in queue.since(2.0)] == [4, 1, 2]
    assert queue.since(0.5) == [] and len(queue.since(9.0)) == len(queue) == 5


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
    assert [message.stream for message in sent(late, Cancel)] == [submits[0].stream], "it is ordered to stop"
    route.check()


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


def test_a_light_tenant_does_not_wait_behind_a_heavy_ones_queue() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=4, prefix_cache=False)
    for _ in range(50):
        route.submit(ask([1], tenant="heavy"), 0.0)
    submits = sent(route.take(), Submit)
    route.submit(ask([2], tenant="light"), 0.1)
    usage = Usage(prompt_tokens=1, output_tokens=0)
    route.hear(b"a", "", Done(boot="a1", stream=submits[0].stream, attempt=1, reason="stop", usage=usage), 1.0)
    assert [submit.prompt_ids for submit in sent(route.take(), Submit)] == [[2]], "the next place is its own"
    route.check()


def test_output_tokens_count_as_they_come_and_a_moved_choice_pays_once() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=1)
    for tenant in ("x", "y"):
        route.submit(ask([1, 2, 3], tenant=tenant), 0.0)
    first, _ = sent(route.take(), Submit)
    route.hear(b"a", "", tokens("a1", first, 0, [7, 8]), 0.1)

    def service() -> dict[str, float]:
        (order,) = route.core.snapshot().table.fair.values()
        return {account.tenant: account.service for account in order.accounts}

    assert service() == {"x": 3 * PROMPT_PRICE + 2 * OUTPUT_PRICE, "y": 3 * PROMPT_PRICE}
    route.unreachable(b"a", 0.2)
    join(route, "b", max_batch_size=1, now=0.3)
    again = sent(route.take(), Submit)
    assert [submit.task.emitted for submit in again] == [[7, 8], []]
    assert service() == {"x": 3 * PROMPT_PRICE + 2 * OUTPUT_PRICE, "y": 3 * PROMPT_PRICE}, "the replica's death is not its tenants' fault"
    message = msgspec.structs.replace(tokens("b1", again[1], 0, [9]), cached=[(again[1].stream, 3)])
    route.hear(b"b", "", message, 0.4)
    assert service()["y"] == 3 * PROMPT_PRICE + OUTPUT_PRICE, (
        "a second attempt's prompt cost nothing, so its cached part gives nothing back"
    )
    route.check()


def test_what_a_replica_found_in_its_cache_is_given_back() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=2)
    route.submit(ask([1] * 10, tenant="x"), 0.0)
    (submit,) = sent(route.take(), Submit)
    route.hear(b"a", "", msgspec.structs.replace(tokens("a1", submit, 0, [7]), cached=[(submit.stream, 8)]), 0.1)
    route.hear(b"a", "", tokens("a1", submit, 1, [7, 7, 7]), 0.2)
    (order,) = route.core.snapshot().table.fair.values()
    right = 2 * PROMPT_PRICE + 8 * CACHED_PRICE + 4 * OUTPUT_PRICE
    assert order.accounts[0].service - order.accounts[0].credit == pytest.approx(right)


def test_a_request_whose_time_is_over_gets_no_place() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=1)
    for number in range(3):
        route.submit(ask([number], deadline_s=1.0 if number == 2 else None), 0.0)
    submits = sent(route.take(), Submit)
    assert [submit.prompt_ids for submit in submits] == [[0], [1]]
    usage = Usage(prompt_tokens=1, output_tokens=0)
    route.hear(b"a", "", Done(boot="a1", stream=submits[0].stream, attempt=1, reason="stop", usage=usage), 1.0)
    left = route.take()
    assert not sent(left, Submit)
    assert [action.error.code for action in left if isinstance(action, FailChoice)] == ["deadline_exceeded"]
    route.check()
