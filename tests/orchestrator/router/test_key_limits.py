"""Limits of API keys: one router alone, and several that know of each other by what their leaders say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.auth.api_keys import KeyLimits
from orchestrator.router.key_limits import LEADER_S, MAX_ACCOUNTS, MINUTE_S, SLICE_S, KeyLimiter, Reservation, duration
from tests.support.key_traffic import KeyTraffic
from workers.protocol.errors import RateLimited
from workers.protocol.messages import MAX_KEYS, KeyUse


class OneKey:
    """A limiter, and requests of one key at given times."""

    def __init__(self, **limits: int) -> None:
        self.limiter, self.limits = KeyLimiter(), KeyLimits(**limits)

    def ask(self, now: float, tokens: int = 1) -> Reservation:
        self.limiter.check("k", "alice", self.limits, now)
        return self.limiter.admit("k", tokens, now)

    def refused(self, now: float, tokens: int = 1) -> RateLimited:
        with pytest.raises(RateLimited) as caught:
            self.ask(now, tokens)
        assert caught.value.status == 429 and caught.value.code == "rate_limit_exceeded"
        return caught.value

    def headers(self, now: float) -> dict[str, str]:
        return {name.removeprefix("x-ratelimit-"): value for name, value in self.limiter.headers("k", now).items()}


def test_requests_in_any_minute() -> None:
    key = OneKey(rpm=3)
    for now in (0.0, 20.0, 40.0):
        key.ask(now)
    error = key.refused(50.0)
    assert error.kind == "requests" and error.retry_after == 10.0 + SLICE_S
    key.ask(50.0 + error.retry_after)
    assert key.refused(61.0).retry_after == 19.0 + SLICE_S, "the next place is free when the second request is a minute old"


def test_a_request_reserves_its_longest_answer_and_settles_with_what_it_used() -> None:
    key = OneKey(tpm=1000)
    first = key.ask(0.0, 600)
    assert key.refused(0.0, 600).kind == "tokens"
    key.limiter.settle(first, 20, 80, 5.0)
    assert key.headers(5.0) == {"limit-tokens": "1000", "remaining-tokens": "900", "reset-tokens": "55.25s"}
    second = key.ask(5.0, 900)
    assert key.refused(6.0, 1).retry_after == 54.0 + SLICE_S
    key.limiter.settle(second, 100, 800, 30.0)
    assert key.refused(30.0, 2).kind == "tokens" and key.headers(60.5)["remaining-tokens"] == "100"


def test_an_answer_longer_than_what_was_reserved_counts() -> None:
    """A request without `max_tokens` reserves less than it may take."""
    key = OneKey(tpm=1000)
    key.limiter.settle(key.ask(0.0, 100), 10, 700, 3.0)
    assert key.headers(3.0)["remaining-tokens"] == "290"


def test_a_request_that_can_never_be_admitted_says_so() -> None:
    key = OneKey(tpm=1000)
    error = key.refused(0.0, 1001)
    assert error.retry_after is None and "its limit is 1000" in str(error)


def test_requests_at_once() -> None:
    key = OneKey(concurrency=2)
    first, _ = key.ask(0.0), key.ask(0.0)
    assert key.refused(1.0).kind == "concurrency"
    key.limiter.settle(first, 1, 1, 2.0)
    key.ask(2.0)
    assert key.refused(500.0).kind == "concurrency", "those that run do not age"


def test_a_key_without_limits_is_only_counted() -> None:
    key = OneKey()
    for number in range(100):
        key.limiter.settle(key.ask(0.0, 10**9), 7, number, 0.0)
    (usage,) = key.limiter.usage(0.0)
    assert (usage.tenant, usage.requests, usage.prompt_tokens, usage.output_tokens) == ("alice", 100, 700, 4950)
    assert key.headers(0.0) == {} and key.limiter.report(0.0) == []


def test_a_limit_that_was_changed_holds_at_the_next_request() -> None:
    key = OneKey(rpm=1)
    key.ask(0.0)
    key.limits = KeyLimits(rpm=2)
    key.ask(0.0)
    assert key.refused(0.0).kind == "requests"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0ms"), (0.012, "12ms"), (0.9994, "999ms"), (1.0, "1s"), (8.64, "8.64s"), (60.0, "1m0s"), (360.0, "6m0s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50), st.integers(0, 50), st.floats(0.0, 20.0)), max_size=60))
def test_no_minute_ever_holds_more_than_the_limits(asked: list[tuple[float, int, int, float]]) -> None:
    """Against a list of everything that was admitted."""
    key, now = OneKey(rpm=5, tpm=100), 0.0
    taken: list[list[float]] = []
    ends: list[tuple[float, Callable[[], None]]] = []
    for pause, tokens, used, lasts in asked:
        now += pause / 10
        for end in sorted((one for one in ends if one[0] <= now), key=lambda one: one[0]):
            end[1]()
            ends.remove(end)
        try:
            held = key.ask(now, tokens)
        except RateLimited:
            continue
        entry = [now, float(tokens)]
        taken.append(entry)

        def settle(held: Reservation = held, entry: list[float] = entry, used: int = min(used, tokens), at: float = now + lasts) -> None:
            key.limiter.settle(held, 0, used, at)
            entry[1] = used

        ends.append((now + lasts, settle))
        last = [one for one in taken if one[0] > now - MINUTE_S]
        assert len(last) <= 5 and sum(one[1] for one in last) <= 100


def test_what_is_remembered_is_bounded() -> None:
    limiter = KeyLimiter()
    held = limiter.admit("held", 1, 0.0)
    for number in range(MAX_ACCOUNTS + 500):
        limiter.check(f"k{number}", "t", KeyLimits(rpm=5), 100.0)
    assert len(limiter._accounts) == MAX_ACCOUNTS
    limiter.settle(held, 1, 1, 100.0)
    assert any(usage.key == "held" for usage in limiter.usage(100.0)), "a key in use is kept"


def test_the_report_names_the_most_active_keys_first_and_is_bounded() -> None:
    limiter = KeyLimiter()
    for number in range(MAX_KEYS + 50):
        limiter.check(f"k{number}", "t", KeyLimits(tpm=10**6), 0.0)
        limiter.admit(f"k{number}", number, 0.0)
    report = limiter.report(0.0)
    assert [use.key for use in report] == [f"k{number}" for number in range(MAX_KEYS + 49, 49, -1)]


# --- several routers


@pytest.mark.parametrize("routers", [1, 2, 4])
@pytest.mark.parametrize("limits", [KeyLimits(rpm=120), KeyLimits(tpm=12_000)], ids=["rpm", "tpm"])
def test_several_routers_keep_one_limit(routers: int, limits: KeyLimits) -> None:
    """Twice the limit is sent, steadily, distributed to all routers, for three minutes: any minute holds the limit within a tenth."""
    traffic = KeyTraffic(routers, leaders=2, limits=limits, heartbeat_s=0.5, seed=routers)
    admitted = traffic.run(seconds=180.0, rate=4.0, tokens=100, lasts_s=1.0)
    for start in range(0, 121, 5):
        minute = sum(start <= at < start + MINUTE_S for at in admitted)
        assert 108 <= minute <= 132, f"{minute} of 120 in the minute from {start}"


def test_a_leader_that_joins_later_changes_nothing() -> None:
    traffic = KeyTraffic(2, leaders=1, limits=KeyLimits(rpm=120), heartbeat_s=0.5, seed=5)
    before = traffic.run(seconds=90.0, rate=4.0, tokens=1, lasts_s=0.1)
    traffic.add_leader()
    after = [*before, *traffic.run(seconds=90.0, rate=4.0, tokens=1, lasts_s=0.1)]
    assert all(108 <= sum(start <= at < start + MINUTE_S for at in after) <= 132 for start in range(0, 121, 5))


def test_a_lying_leader_beside_a_true_one_takes_nothing_from_a_key() -> None:
    limiter, limits = KeyLimiter(), KeyLimits(rpm=10)
    limiter.check("k", "t", limits, 0.0)
    for leader in ("true", "liar"):
        limiter.hear(leader, [], 0.0)
    limiter.hear("liar", [KeyUse("k", 10**6, 10**6, 0, 10**6)], 0.5)
    limiter.hear("true", [KeyUse("k", 3, 3, 0, 1)], 0.6)
    for _ in range(7):
        limiter.check("k", "t", limits, 1.0)
        limiter.admit("k", 1, 1.0)
    with pytest.raises(RateLimited):
        limiter.check("k", "t", limits, 1.0)


def test_news_that_comes_twice_or_by_several_leaders_counts_once() -> None:
    limiter = KeyLimiter()
    for leader in ("a", "b", "a"):
        limiter.hear(leader, [], 0.0)
    for leader in ("a", "b", "b", "a"):
        limiter.hear(leader, [KeyUse("k", 5, 50, 20, 2)], 1.0)
    limiter.check("k", "t", KeyLimits(rpm=100), 1.0)
    assert limiter.headers("k", 1.0)["x-ratelimit-remaining-requests"] == "95"
    assert limiter._accounts["k"].window.tokens == 30 and limiter._accounts["k"].others_running == 2
    for leader in ("a", "b"):
        limiter.hear(leader, [], 2.0)
    assert limiter._accounts["k"].others_running == 0


def test_requests_at_once_are_counted_over_all_routers() -> None:
    limiter, limits = KeyLimiter(), KeyLimits(concurrency=3)
    limiter.hear("a", [], 0.0)
    limiter.hear("a", [KeyUse("k", 2, 2, 0, 2)], 1.0)
    limiter.check("k", "t", limits, 1.0)
    limiter.admit("k", 1, 1.0)
    with pytest.raises(RateLimited):
        limiter.check("k", "t", limits, 1.0)
    limiter.hear("b", [], 1.0 + 2 * LEADER_S)
    limiter.hear("b", [KeyUse("other", 1, 1, 0, 1)], 1.1 + 2 * LEADER_S)
    assert "a" not in limiter._leaders
