"""The rate at which a model is served, and what ``retry_after`` is made of it."""

from __future__ import annotations

import pytest

from orchestrator.router.core.service_rate import RETRY_MAX_S, RETRY_MIN_S, WINDOW, ServiceRate
from tests.support.router_core import ask, beat, join, router, sent
from workers.protocol.errors import Overloaded
from workers.protocol.messages import (
    Done,
    Submit,
    Usage,
)


def test_nothing_measured_asks_for_the_shortest_wait() -> None:
    rate = ServiceRate()
    assert rate.retry_after(100, 0.0) == RETRY_MIN_S
    rate.note_end(10, 0.0)
    assert rate.retry_after(100, 5.0) == RETRY_MIN_S, "one completion is no rate"


def test_half_of_those_that_wait_must_be_served_first() -> None:
    rate = ServiceRate(ends=[0.0, 2.0, 4.0])
    assert rate.retry_after(9, 4.0) == 2.0 * 10 / 2
    assert rate.retry_after(9, 8.0) == 4.0 * 10 / 2, "time without a completion counts"
    assert rate.retry_after(0, 4.0) == RETRY_MIN_S and rate.retry_after(10_000, 4.0) == RETRY_MAX_S


def test_only_the_last_completions_count() -> None:
    rate = ServiceRate()
    for second in range(100):
        rate.note_end(1, float(second))
    for index in range(WINDOW):
        rate.note_end(1, 100.0 + index * 0.5)
    end = 100.0 + (WINDOW - 1) * 0.5
    assert rate.retry_after(19, end) == 0.5 * 20 / 2


def test_the_usual_length_follows_the_answers_and_survives_a_snapshot() -> None:
    rate = ServiceRate()
    for second in range(200):
        rate.note_end(500, float(second))
    assert 490 < rate.output_tokens <= 500
    found = rate.snapshot()
    twin = ServiceRate(found.ends, found.output_tokens)
    assert twin.snapshot() == found and twin.retry_after(7, 300.0) == rate.retry_after(7, 300.0)


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
