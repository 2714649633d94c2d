"""The queue of a model: its order, alone and through the routing core, and how long a choice may wait in it."""

from __future__ import annotations

from math import inf

import pytest

from orchestrator.router.core.actions import DeliverTokens, FailChoice
from orchestrator.router.core.choice_state import ChoiceState, RequestState
from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.waiting_queue import WaitingQueue
from tests.support.router_core import ask, delivered, join, router, sent, tokens
from workers.protocol.errors import Unavailable
from workers.protocol.messages import (
    Cancel,
    Done,
    Submit,
    Usage,
)


def waiting(id: int, queued_at: float) -> ChoiceState:
    """A choice that came to a queue at ``queued_at``."""
    request = RequestState(SubmitRequest(id=id, request=ask(), session=""), queued_at, inf)
    return ChoiceState(request, id, 0, request.spec.params, [])


def drained(queue: WaitingQueue) -> list[int]:
    """The ids of all choices in the order in which they leave."""
    ids = []
    while (choice := queue.first()) is not None:
        ids.append(choice.id)
        queue.remove(choice)
    return ids


def test_a_queue_is_first_come_first_served() -> None:
    queue = WaitingQueue()
    assert queue.first() is None and len(queue) == 0
    for id in (3, 1, 2):
        queue.push(waiting(id, 0.0))
    assert len(queue) == 3 and drained(queue) == [3, 1, 2] and len(queue) == 0


def test_choices_that_lost_their_replica_leave_before_all_new_ones() -> None:
    queue = WaitingQueue()
    queue.push(waiting(1, 0.0))
    queue.push_returned(waiting(9, 5.0))
    queue.push(waiting(2, 6.0))
    queue.push_returned(waiting(8, 7.0))
    assert queue.ids() == ([9, 8], [1, 2])
    assert drained(queue) == [9, 8, 1, 2]


def test_any_choice_can_leave_the_queue_from_its_middle() -> None:
    queue = WaitingQueue()
    new, returned = [waiting(id, 0.0) for id in (1, 2, 3)], [waiting(id, 0.0) for id in (4, 5, 6)]
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
        queue.push(waiting(id, queued_at))
    for id, queued_at in ((4, 1.5), (5, 2.5)):
        queue.push_returned(waiting(id, queued_at))
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
    assert [message.stream for message in sent(late, Cancel)] == [submits[0].stream], "it is told to stop"
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
