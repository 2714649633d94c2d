"""A tenant that fills the queue, or never reads, through the whole core: the others still have room, places and their turn."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.router.core.router_core import RouterCore
from tests.support.router_core import CoreDriver, ask, join, router, sent, tokens
from workers.protocol.errors import Overloaded, TenantLimit
from workers.protocol.messages import Submit


def fill(route: CoreDriver, tenant: str, most: int, **change: Any) -> tuple[int, TenantLimit | Overloaded | None]:
    """Submit requests of ``tenant`` until one is refused: how many were taken, and why no more."""
    for taken in range(most):
        try:
            route.submit(ask([7], tenant=tenant, **change), 0.0)
        except Overloaded as error:
            return taken, error
    return most, None


def test_a_full_queue_of_one_tenant_is_not_full_for_others() -> None:
    route = router(max_queue=8)
    taken, why = fill(route, "flood", 100)
    assert taken == 8 and type(why) is Overloaded, "alone, it may take the whole queue"
    for name in "abcd":
        assert fill(route, name, 100)[0] == 2, "a quarter each"
        route.check()
    taken, why = fill(route, "flood", 100)
    assert taken == 0 and isinstance(why, TenantLimit) and why.retry_after
    taken, why = fill(route, "e", 100)
    assert taken == 0 and type(why) is Overloaded, "twice the bound in all"
    assert route.core.waiting("m") == 16


def test_a_request_counts_with_all_its_choices() -> None:
    route = router(max_queue=8)
    fill(route, "flood", 8)
    with pytest.raises(Overloaded):
        route.submit(ask([1], tenant="a", n=3), 0.0)
    route.submit(ask([1], tenant="a", n=2), 0.0)
    with pytest.raises(TenantLimit):
        route.submit(ask([1], tenant="a"), 0.0)


def test_waiting_tokens_are_bounded_by_tenant() -> None:
    route = router(max_queue=100, max_queued_tokens=1000)
    for _ in range(3):
        route.submit(ask([1] * 300, tenant="long"), 0.0)
    route.submit(ask([1] * 50, tenant="short"), 0.0)
    with pytest.raises(TenantLimit, match="prompt tokens"):
        route.submit(ask([1] * 300, tenant="long"), 0.0)
    route.submit(ask([1] * 200, tenant="short"), 0.0)
    with pytest.raises(TenantLimit):
        route.submit(ask([1], tenant="short"), 0.0)
    route.check()


def test_the_first_prompt_may_be_as_long_as_any() -> None:
    route = router(max_queue=100, max_queued_tokens=10)
    route.submit(ask([1] * 500, tenant="long"), 0.0)


def pause_all(route: CoreDriver) -> int:
    """Every choice that was sent gets its one token, until no more are sent; how many there were."""
    count = 0
    while submits := sent(route.take(), Submit):
        count += len(submits)
        for submit in submits:
            route.hear(b"a", "", tokens("a1", submit, 0, [65]), 0.0)
    return count


def test_choices_that_nobody_reads_hold_no_place_of_others() -> None:
    """One token of credit each, as many as are taken: a choice of another tenant is placed at once, and ends give the first its turn."""
    route = router(max_queue=100)
    join(route, "a", max_batch_size=2)
    ids = [route.submit(ask([index + 1], tenant="mute", credit=1), 0.0) for index in range(60)]
    assert pause_all(route) == 16, "eight times the batch"
    assert route.core.waiting("m") == 44
    route.submit(ask([5], tenant="good"), 1.0)
    assert [submit.prompt_ids for submit in sent(route.take(), Submit)] == [[5]]
    assert route.core.waiting("m") == 44
    route.check()
    again = RouterCore.restored(route.core.settings(), route.core.snapshot(), route.core._prefixes)
    again.check()
    assert again.snapshot() == route.core.snapshot(), "held tenants and what they wait with are part of the state"
    for id in ids[:14]:
        route.cancel(id, 2.0)
    assert len(sent(route.take(), Submit)) == 2, "the good tenant runs, and the batch and its lookahead are full again"
    route.check()


def test_tenants_that_never_read_leave_a_reserve_together() -> None:
    """Three of them fill what one tenant may, then each its share of the reserve; a fourth is still placed."""
    route = router(max_queue=1000)
    join(route, "a", max_batch_size=4)
    for tenant in ("x", "y", "z"):
        for index in range(60):
            route.submit(ask([index + 1], tenant=tenant, credit=1), 0.0)
        pause_all(route)
    assert route.placed <= 32 + 2 * (8 + 4)
    route.submit(ask([5], tenant="good"), 1.0)
    assert [submit.prompt_ids for submit in sent(route.take(), Submit)] == [[5]]
    route.check()
