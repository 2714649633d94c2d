"""What a router believes of prefix caches: an index is bounded, follows what replicas report, and ends with its replica."""

from __future__ import annotations

from orchestrator.router.core.prefix_index import PrefixIndex
from tests.support.router_core import CoreDriver, ask, beat, join, router, where
from workers.scheduler.block_pool import prefix_hashes

PROMPT = list(range(1, 65))


def test_an_index_is_bounded_and_drops_leaves_first() -> None:
    index = PrefixIndex(4)
    index.add([1, 2, 3])
    index.add([1, 9])
    assert len(index) == 4 and index.matched([1, 2, 3]) == 3
    index.add([1, 8])
    assert index.matched([1, 2, 3]) == 2 and index.matched([1, 8]) == 2 and index.matched([5]) == 0


def both() -> CoreDriver:
    route = router(max_queue=50)
    for name in ("a", "b"):
        join(route, name, max_batch_size=16)
    route.take()
    return route


def expected_cached(route: CoreDriver) -> int:
    """Tokens that the replica to which a request with :data:`PROMPT` goes now is expected to hold."""
    route.core.prefix_answers.clear()
    route.submit(ask(PROMPT), 9.0)
    return max(route.core.prefix_answers[0])


def test_prefixes_that_a_replica_reports_count_as_cached_whoever_sent_them() -> None:
    route = both()
    route.hear(b"b", "", beat(boot="b1", prefixes=prefix_hashes(PROMPT, 16, "")[:2]), 1.0)
    route.hear(b"b", "", beat(boot="b1"), 2.0)
    heartbeat = route.registry.replicas["b"].last_heartbeat
    assert heartbeat is not None and not heartbeat.stats.prefixes, "hashes are kept in one place"
    assert expected_cached(route) == 32
    assert where(route.take()) == [b"b"]


def test_a_lost_replica_holds_nothing() -> None:
    route = both()
    route.submit(ask(PROMPT), 0.0)
    (place,) = where(route.take())
    other = {b"a": b"b", b"b": b"a"}[place]
    assert expected_cached(route) == 64
    route.unreachable(place, 9.0)
    assert set(where(route.take())) == {other}
    route.hear(place, "", beat(boot=f"{place.decode()}1"), 9.5)
    route.core.prefix_answers.clear()
    route.submit(ask(PROMPT), 9.5)
    (answer,) = route.core.prefix_answers
    assert dict(zip((b"a", b"b"), answer, strict=True)) == {place: 0, other: 64}
