"""The judge's clock: equal to the clock that it follows while the judge runs, and deaf to the time in which it did not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.protocol.running_clock import LONGEST_TURN_S, RunningClock

PAUSES = st.lists(st.floats(0.0, 100.0), max_size=50)


@given(PAUSES, st.floats(0.01, 2.0))
def test_a_gap_counts_as_one_turn(pauses: list[float], longest_s: float) -> None:
    now = 1000.0
    clock = RunningClock(now, longest_s)
    ran, frozen = now, 0.0
    for pause in pauses:
        now += pause
        before = clock.at(now)
        frozen += clock.turn(now)
        ran += min(pause, longest_s)
        assert clock.at(now) == pytest.approx(ran) and before == clock.at(now)
        assert ran + frozen == pytest.approx(now)


@given(PAUSES, PAUSES)
def test_it_never_goes_back_and_never_runs_ahead(turns: list[float], looks: list[float]) -> None:
    events = sorted([(1000.0 + at, True) for at in turns] + [(1000.0 + at, False) for at in looks])
    clock, last = RunningClock(1000.0), 1000.0
    for now, is_turn in events:
        if is_turn:
            clock.turn(now)
        seen = clock.at(now)
        assert last <= seen <= now + 1e-9
        last = seen


def test_a_judge_that_turns_often_enough_sees_the_time_itself() -> None:
    clock = RunningClock(5.0)
    for step in range(1, 1001):
        assert clock.turn(5.0 + step * LONGEST_TURN_S * 0.99) == 0.0
    assert clock.at(5.0 + 1000 * LONGEST_TURN_S * 0.99) == pytest.approx(5.0 + 1000 * LONGEST_TURN_S * 0.99)


def test_between_two_turns_it_stands_still_at_the_bound() -> None:
    clock = RunningClock(0.0)
    assert [clock.at(now) for now in (0.1, 0.2, 12.0, 60.0)] == [0.1, 0.2, LONGEST_TURN_S, LONGEST_TURN_S]
    assert clock.turn(60.0) == 60.0 - LONGEST_TURN_S
    assert clock.at(60.1) == pytest.approx(LONGEST_TURN_S + 0.1)
