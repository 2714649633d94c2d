"""The routing core's measurements: waits, estimates, decisions, and the outcome of choices that had to move."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.router.core.stats import CAUSES, Attempt
from orchestrator.router.core.wait_estimate import expected_wait_ms, first_token_ms
from orchestrator.router.metrics import Metrics
from tests.support.router_core import CoreDriver, accept, ask, beat, join, router, sent, tokens
from workers.protocol.messages import Accepted, Done, Submit, Usage


def done(route: CoreDriver, place: str, submit: Submit, output: int, now: float, **usage: Any) -> None:
    found = Usage(prompt_tokens=len(submit.prompt_ids), output_tokens=output, **usage)
    route.hear(place.encode(), "", Done(boot=f"{place}1", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=found), now)


def test_the_parts_of_a_request_are_measured() -> None:
    route = router(max_queue=8)
    trail: list[Attempt] = []
    route.submit(ask(attempts=[trail]), 1.0)
    join(route, "a", now=3.0)
    (submit,) = sent(route.take(), Submit)
    route.hear(b"a", "", Accepted(boot="a1", stream=submit.stream, attempt=submit.attempt), 3.25)
    route.hear(b"a", "", tokens("a1", submit, 0, [5]), 3.5)
    route.hear(b"a", "", tokens("a1", submit, 1, [6]), 4.0)
    done(route, "a", submit, 2, 4.5)
    tally = route.stats["m"]
    assert (tally.queue.total, tally.prefill.total, tally.decode.total, tally.inference.total) == (2.0, 0.5, 1.0, 1.5)
    assert tally.actual_wait.total == 0.5 and tally.wait_error.total == abs(0.5 - tally.expected_wait.total)
    assert (tally.choices.total, tally.limits.total) == (1, 8)
    assert tally.decisions["only"] == 1 and not any(tally.moved.values())
    (placement,) = trail
    assert (placement.queued_at, placement.sent_at, placement.first_at) == (1.0, 3.0, 3.5)
    assert placement.cached is None and (placement.tokens, placement.number, placement.cause) == (3, 1, "")


def test_the_first_token_is_expected_in_whole_steps() -> None:
    route = router()
    join(route, "a")
    route.hear(b"a", "", beat(boot="a1", step_ms=20.0), 0.0)
    alone: list[Attempt] = []
    beside: list[Attempt] = []
    long: list[Attempt] = []
    for trail, prompt in ((alone, [1]), (beside, [2]), (long, list(range(1, 601)))):
        route.submit(ask(prompt, attempts=[trail]), 0.0)
    assert [round(trail[0].expected_s, 3) for trail in (alone, beside)] == [0.02, 0.03]
    assert long[0].expected_s == pytest.approx(0.02 * (602 / 62) + 0.01)


def test_a_stop_string_ends_the_measures_too() -> None:
    route = router()
    join(route, "a")
    id = route.submit(ask(), 0.0)
    (submit,) = sent(route.take(), Submit)
    route.hear(b"a", "", tokens("a1", submit, 0, [5]), 1.0)
    route.stop_choice(id, 0, 2.0)
    route.stop_choice(id, 0, 3.0)
    tally = route.stats["m"]
    assert (sum(tally.decode.counts), tally.decode.total, tally.inference.total) == (1, 1.0, 2.0)


def test_decisions_have_reasons() -> None:
    route = router(max_queue=50)
    for name in ("a", "b"):
        join(route, name, max_batch_size=16)
    prompt = list(range(1, 65))
    for index, (ids, affinity) in enumerate(((prompt, ""), (prompt, "s"), (prompt, "s"), ([900, 901], ""))):
        route.submit(ask(ids, affinity=affinity), float(index))
        (submit,) = sent(route.take(), Submit)
        done(route, "a" if submit.stream in route.registry.replicas["a"].streams else "b", submit, 0, index + 0.5)
        for name in ("a", "b"):
            route.hear(name.encode(), "", beat(boot=f"{name}1"), index + 0.5)
    assert route.stats["m"].decisions == {"only": 0, "session": 1, "prefix": 1, "load": 2}
    route.registry.replicas["b"].refuse()
    route.submit(ask(prompt), 9.0)
    assert route.stats["m"].decisions["only"] == 1


def test_guessed_prefixes_are_held_against_those_found() -> None:
    route = router(max_queue=50)
    for name in ("a", "b"):
        join(route, name, max_batch_size=16)
    prompt = list(range(1, 65))
    route.submit(ask(prompt), 0.0)
    (first,) = sent(route.take(), Submit)
    done(route, "a", first, 0, 1.0)
    route.hear(b"a", "", beat(boot="a1"), 1.0)
    route.submit(ask(prompt), 1.0)
    (second,) = sent(route.take(), Submit)
    done(route, "a", second, 0, 2.0, cached_tokens=48)
    tally = route.stats["m"]
    assert (tally.expected_hits, tally.actual_hits) == (64, 48)


def test_choices_that_move_are_counted_by_cause_and_outcome() -> None:
    route = router(max_queue=50, replica_limit=2, queue_timeout_s=5.0)
    join(route, "a")
    route.submit(ask([1]), 0.0)
    route.submit(ask([2]), 0.0)
    one, two = sent(route.take(), Submit)
    accept(route, one, two, place="a")
    route.hear(b"a", "", tokens("a1", one, 0, [5, 6, 7, 8, 9]), 1.0)
    route.tick(4.0)
    tally = route.stats["m"]
    assert tally.losses["silent"] == 1 and tally.moved["silent"] == 2 and not any(tally.resumed.values())
    join(route, "b", now=4.5)
    one, two = sent(route.take(), Submit)
    route.hear(b"b", "", tokens("b1", one, 5, [10]), 5.0)
    assert tally.resumed["silent"] == 1 and tally.pause.total == pytest.approx(1.0)
    accept(route, two, place="b")
    route.hear(b"b", "", beat(boot="b1", busy_ms=60_000.0), 6.0)
    assert tally.losses["hung"] == 1 and tally.failed["hung"] == 1, "its second death: it fails"
    assert tally.moved["hung"] == 2, "the other one got on, so it goes on"
    route.tick(12.0)
    assert tally.failed == dict.fromkeys(CAUSES, 0) | {"hung": 2}, "nothing came to serve it in time"
    assert sum(tally.queue.counts) == 2, "a wait for another place is no wait in the queue"
    route.check()


def test_a_scrape_shows_them() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    text = Metrics(["m"], stats=route.stats).render().decode()
    assert 'trireme_router_decisions_total{model_name="m",reason="only"} 1.0' in text
    assert 'trireme_request_queue_time_seconds_count{model_name="m"} 1.0' in text


def test_the_wait_for_a_first_token_is_part_of_the_whole_wait() -> None:
    base: dict[str, Any] = {
        "step_ms": 10.0,
        "occupancy": 4,
        "max_batch_size": 8,
        "step_tokens": 100,
        "queued_tokens": 86,
        "choice_ms": 500.0,
    }
    first = first_token_ms(**base, new_tokens=10)
    assert first == pytest.approx(10.0)
    whole = expected_wait_ms(**base, known_tokens=30, cached_tokens=20, output_tokens=50.0)
    assert whole == pytest.approx(first + 10.0 * 50 * 4 / 100)
