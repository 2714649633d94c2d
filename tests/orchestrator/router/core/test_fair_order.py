"""Whose turn it is: shares by weighted service, turns among equals, tenants that come back, bands, and what a choice costs."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.router.core.fair_order import AGING_S, CACHED_PRICE, MAX_IDLE, OUTPUT_PRICE, PROMPT_PRICE, FairOrder, TenantAccount
from tests.support.examples import examples


class Served:
    """An order that a test plays the queue of: choices with a prompt and an answer, served one after the other."""

    def __init__(self) -> None:
        self.order = FairOrder()
        self.waiting: dict[int, tuple[TenantAccount, int, int, int]] = {}
        self._ids = 0

    def ask(self, tenant: str, *, prompt: int = 1, output: int = 0, weight: float = 1.0, priority: int = 0) -> int:
        self._ids += 1
        account = self.order.open(tenant, weight, 1)
        self.waiting[self._ids] = (account, priority, prompt, output)
        self.order.push(account, self._ids, priority)
        return self._ids

    def next(self, now: float = 0.0) -> tuple[int, str]:
        """The choice whose turn it is leaves, and gets its whole answer at once."""
        id = self.order.first(now)
        assert id is not None
        account, priority, prompt, output = self.waiting.pop(id)
        self.order.remove(account, id, priority)
        self.order.note_sent(account, priority, prompt, now)
        account.charge_output(output)
        self.order.close(account)
        self.order.check(len(self.waiting))
        return id, account.tenant

    def tenants(self, count: int, now: float = 0.0) -> list[str]:
        return [self.next(now)[1] for _ in range(count)]


def test_one_tenant_is_served_in_the_order_of_its_arrivals() -> None:
    served = Served()
    asked = [served.ask("a", prompt=prompt) for prompt in (9, 1, 5)]
    assert [served.next()[0] for _ in asked] == asked
    assert served.order.first(0.0) is None


def test_a_new_tenant_does_not_wait_behind_the_backlog_of_another() -> None:
    served = Served()
    for _ in range(1000):
        served.ask("heavy")
    assert served.tenants(3) == ["heavy"] * 3
    served.ask("light")
    assert served.next()[1] == "light"


def test_tenants_share_tokens_not_requests() -> None:
    served = Served()
    for _ in range(100):
        served.ask("long", prompt=100)
        served.ask("short", prompt=10)
    turns = Counter(served.tenants(110))
    assert turns == {"long": 10, "short": 100}


def test_output_counts_more_than_prompt_and_cached_prompt_less() -> None:
    account = TenantAccount("a", 1)
    account.charge(PROMPT_PRICE * 100)
    account.charge_output(10)
    assert account.service == 100 * PROMPT_PRICE + 10 * OUTPUT_PRICE
    account.find_cached(100)
    before = account.service
    account.charge(PROMPT_PRICE * 200)
    assert account.service - before == pytest.approx(200 * PROMPT_PRICE - 100 * (PROMPT_PRICE - CACHED_PRICE))


def test_a_weight_is_a_share() -> None:
    served = Served()
    for _ in range(300):
        served.ask("three", weight=3.0, prompt=7)
        served.ask("one", prompt=7)
    turns = Counter(served.tenants(200))
    assert abs(turns["three"] - 150) <= 3


def test_a_tenant_that_comes_back_has_saved_nothing_up_and_owes_what_it_had_more() -> None:
    served = Served()
    served.ask("early", prompt=500)
    assert served.next()[1] == "early"
    for _ in range(50):
        served.ask("steady", prompt=10)
    served.ask("late", prompt=10)
    served.ask("early", prompt=10)
    turns = served.tenants(52)
    assert turns.index("late") == 1 and turns.index("early") == 51, "early has had its 500 tokens when steady has had as many"
    for _ in range(50):
        served.ask("late", prompt=10)
        served.ask("early", prompt=10)
    assert Counter(served.tenants(20)) == {"late": 10, "early": 10}, "late is not owed the 500 tokens for which it did not ask"


def test_a_smaller_priority_goes_first_and_tenants_share_within_it() -> None:
    served = Served()
    for _ in range(4):
        served.ask("a", priority=1)
        served.ask("b", priority=0)
        served.ask("c", priority=0)
    turns = served.tenants(12)
    assert Counter(turns[:8]) == {"b": 4, "c": 4} and turns[8:] == ["a"] * 4


def test_priorities_beyond_the_bands_count_as_the_last_band() -> None:
    served = Served()
    asked = [served.ask("a", priority=priority) for priority in (10**9, 9, -(10**9), -9)]
    assert [served.next()[0] for _ in asked] == [asked[2], asked[3], asked[0], asked[1]]


def test_a_band_is_passed_over_for_a_bounded_time() -> None:
    served = Served()
    waits_since, low = 100.0, served.ask("low", priority=5)
    now = waits_since
    sent_at = None
    while sent_at is None:
        served.ask("urgent", priority=-1)
        if served.next(now)[0] == low:
            sent_at = now
        now += 0.25
    assert waits_since + AGING_S <= sent_at <= waits_since + AGING_S + 0.25


def test_no_band_ages_while_none_is_served_before_it() -> None:
    """A backlog that waits for places for minutes stays in its band: what comes later with a smaller number goes first."""
    served = Served()
    for _ in range(3):
        served.ask("old", priority=2)
    served.ask("new", priority=1)
    assert served.next(1000.0)[1] == "new"


def test_a_tenant_can_leave_from_anywhere() -> None:
    served = Served()
    asked = [served.ask(tenant) for tenant in ("a", "b", "a", "c")]
    account, priority, _, _ = served.waiting.pop(asked[1])
    served.order.remove(account, asked[1], priority)
    served.order.close(account)
    assert served.tenants(3) == ["a", "c", "a"]
    with pytest.raises(KeyError):
        served.order.remove(account, asked[1], priority)


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    order = FairOrder()
    for number in range(3 * MAX_IDLE):
        order.close(order.open(f"t{number}", 1.0, 1))
    assert [account.tenant for account in order.snapshot().accounts] == [f"t{number}" for number in range(2 * MAX_IDLE, 3 * MAX_IDLE)]


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32))
def test_tenants_that_wait_all_the_time_differ_by_no_more_than_one_choice(tenants: int, seed: int) -> None:
    """The bound of VTC: it does not grow with time. One choice is served at a time, so it is what the largest one costs."""
    chance, served = Random(seed), Served()
    largest, got = 40 * PROMPT_PRICE + 20 * OUTPUT_PRICE, Counter[str]()
    for tenant in range(tenants):
        for _ in range(2):
            served.ask(f"t{tenant}", prompt=chance.randint(1, 40), output=chance.randint(0, 20))
    for _ in range(400):
        id = served.order.first(0.0)
        assert id is not None
        account, _, prompt, output = served.waiting[id]
        served.next()
        got[account.tenant] += prompt * PROMPT_PRICE + output * OUTPUT_PRICE
        served.ask(account.tenant, prompt=chance.randint(1, 40), output=chance.randint(0, 20))
        assert max(got.values()) - min(got[f"t{tenant}"] for tenant in range(tenants)) <= largest


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 2**32))
def test_a_restored_order_goes_on_as_the_first_one_would(seed: int) -> None:
    chance, served = Random(seed), Served()
    now = 0.0
    for _ in range(chance.randint(1, 60)):
        if chance.random() < 0.6 or not served.waiting:
            served.ask(
                f"t{chance.randrange(4)}", prompt=chance.randint(1, 9), output=chance.randint(0, 9),
                priority=chance.choice((0, 0, 1, -1)), weight=chance.choice((1.0, 2.0)),
            )  # fmt: skip
        else:
            served.next(now)
        now += chance.choice((0.1, 3.0))
    twin = Served()
    twin.order = FairOrder(served.order.snapshot())
    for id, (account, priority, prompt, output) in served.waiting.items():
        other = twin.order.restore(account.tenant, 1)
        twin.waiting[id] = (other, priority, prompt, output)
        twin.order.push_again(other, id, priority)
    twin.order.check(len(twin.waiting))
    assert twin.order.snapshot() == served.order.snapshot()
    while served.waiting:
        now += chance.choice((0.1, 3.0))
        assert served.next(now) == twin.next(now)
    assert twin.order.snapshot() == served.order.snapshot()


def test_a_choice_costs_the_same_with_many_tenants() -> None:
    """Counted, not timed: entries of the heap that are looked at until 5,000 choices of 1,000 tenants have left."""
    served = Served()
    chance = Random(1)
    for _ in range(5000):
        served.ask(f"t{chance.randrange(1000)}", prompt=chance.randint(1, 1000))
    looked = 0
    (band,) = served.order._bands

    class Counted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(index)

    band.heap = Counted(band.heap)
    order = served.order
    for _ in range(5000):
        id = order.first(0.0)
        assert id is not None
        account, priority, prompt, _ = served.waiting.pop(id)
        order.remove(account, id, priority)
        order.note_sent(account, priority, prompt, 0.0)
        order.close(account)
    assert looked < 3 * 5000
