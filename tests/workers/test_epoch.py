"""Epochs: newer is larger, and the time of the launch is in the number."""

from __future__ import annotations

import time

from workers.epoch import make_epoch, started_at


def test_an_epoch_tells_when_its_launch_was() -> None:
    before = time.time()
    epoch = make_epoch()
    assert before - 0.002 <= started_at(epoch) <= time.time() + 0.002


def test_a_later_launch_has_the_larger_epoch() -> None:
    first = make_epoch()
    while time.time() * 1000 < (first >> 16) + 1:
        time.sleep(0.001)
    assert make_epoch() > first


def test_an_epoch_is_above_the_last_one_whatever_the_clock_says() -> None:
    ahead = make_epoch() + (3_600_000 << 16)
    again = make_epoch(ahead)
    assert again > ahead and make_epoch(again) > again
    assert make_epoch(7) > 1 << 50, "a clock that is right is followed"


def test_a_number_that_somebody_chose_holds_no_time() -> None:
    assert started_at(7) == 0.0
