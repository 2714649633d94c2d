"""What a leader makes of the routers' totals: sums over the others, which only grow."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.protocol.messages import MAX_KEYS, KeyUse
from workers.serving.key_sums import MAX_BOOTS, KeySums


def use(key: str, requests: int, running: int = 0) -> KeyUse:
    return KeyUse(key, requests, 10 * requests, requests, running)


def test_a_router_hears_of_all_others_and_not_of_itself() -> None:
    sums = KeySums()
    for boot in ("a", "b", "c"):
        sums.report(boot, [])
    sums.report("a", [use("k", 3, 1)])
    sums.report("b", [use("k", 4, 2)])
    assert sums.others("a") == [use("k", 4, 2)]
    assert sums.others("c") == [use("k", 7, 3)]
    sums.report("a", [])
    assert sums.others("c") == [use("k", 7, 2)], "a key of which a router says nothing runs there no longer"


def test_what_was_taken_before_a_leader_heard_of_it_is_not_news() -> None:
    sums = KeySums()
    sums.report("a", [use("k", 100)])
    assert sums.others("b") == []
    sums.report("a", [use("k", 103)])
    assert sums.others("b") == [use("k", 3)]


def test_a_key_that_comes_into_use_again_begins_at_nought() -> None:
    sums = KeySums()
    sums.report("a", [])
    for totals in ([use("k", 5)], [], [use("k", 2)], [use("k", 3)]):
        sums.report("a", totals)
    assert sums.others("b") == [use("k", 8)]


def test_a_router_that_is_gone_runs_nothing_and_what_it_took_stays() -> None:
    sums = KeySums()
    sums.report("a", [])
    sums.report("a", [use("k", 5, 2)])
    sums.gone("a")
    assert sums.others("b") == [use("k", 5)]
    sums.report("a", [use("k", 6, 2)])
    assert sums.others("b") == [use("k", 6, 2)], "it was only cut off"
    for number in range(2 * MAX_BOOTS):
        sums.report(f"later{number}", [])
    assert sums.others("b") == [use("k", 6)]


def test_what_changed_last_comes_first_and_a_message_holds_so_much() -> None:
    sums = KeySums()
    sums.report("a", [])
    for number in range(3):
        sums.report("a", [use(f"k{number}.{key}", 1) for key in range(MAX_KEYS)])
    assert [one.key for one in sums.others("b")] == [f"k2.{key}" for key in range(MAX_KEYS)], (
        "the most active first, as the router had them"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_sums_only_grow_and_miss_nothing(seed: int) -> None:
    """Whatever of two routers' heartbeats is repeated, late or lost."""
    chance, sums = Random(seed), KeySums()
    totals, told = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for boot in totals:
        sums.report(boot, [])
    before = 0
    for _ in range(60):
        boot = chance.choice("ab")
        totals[boot] += chance.randint(0, 3)
        if chance.random() < 0.7 and totals[boot]:
            sums.report(boot, [use("k", totals[boot], chance.randint(0, 2))])
            told[boot] = totals[boot]
        if chance.random() < 0.1:
            sums.gone(boot)
        found = sum(one.requests for one in sums.others("c"))
        assert found == sum(told.values()) and found >= before
        before = found
