"""The routing core as a whole: admission, drains, and the policy that decides.

Its states (waiting queue, request table, registry, sessions ...) have tests of their own names beside this one. Any order of events:
tests/property/test_route_any_order.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.router.core.policy import Candidate, PlacementQuery
from orchestrator.router.core.stats import PlacementReason
from tests.support.router_core import ask, beat, join, router, sent, tokens, where
from workers.protocol.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable
from workers.protocol.messages import Bye, Done, Failed, Submit, Usage


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
