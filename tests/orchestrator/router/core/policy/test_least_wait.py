"""The policy ``least_wait`` through the routing core: prefixes, bursts, and replicas of unequal speed. Sessions: test_session_table.py."""

from __future__ import annotations

from tests.support.router_core import CoreDriver, ask, beat, join, router, sent, where
from workers.protocol.messages import (
    Accepted,
    Submit,
)


def burst(route: CoreDriver, count: int) -> list[bytes]:
    """Where ``count`` choices go that have no prefix in common."""
    places = []
    for index in range(count):
        route.submit(ask([index * 7 + 1] * 20), 0.0)
        places += where(route.take())
    return places


def test_prefixes_attract_until_the_wait_is_longer() -> None:
    route = router(max_queue=100)
    choices = {b"a": 0, b"b": 0}
    for peer in choices:
        join(route, peer.decode(), max_batch_size=32)
    route.take()
    shared = list(range(1, 321))
    places = []
    for index in range(40):
        route.submit(ask([*shared, 400 + index]), 0.0)
        actions = route.take()
        (place,), (submit,) = where(actions), sent(actions, Submit)
        places.append(place)
        choices[place] += 1
        boot = f"{place.decode()}1"
        route.hear(place, "", Accepted(boot=boot, stream=submit.stream, attempt=1), 0.0)
        for peer, running in choices.items():  # the prefill is over by the next request
            route.hear(peer, "", beat(boot=f"{peer.decode()}1", step_ms=10.0, running=running), 0.0)
    assert places[0] == places[1] == places[2], "a cached prefix attracts"
    assert 10 <= places.count(b"a") <= 30, "and does not make a hot spot"


def test_without_a_cache_no_prefix_attracts() -> None:
    route = router(max_queue=100)
    for name in ("a", "b"):
        join(route, name, max_batch_size=32, prefix_cache=False)
    route.take()
    shared = list(range(1, 321))
    places = []
    for index in range(20):
        route.submit(ask([*shared, 400 + index]), 0.0)
        places += where(route.take())
    assert places.count(b"a") == places.count(b"b") == 10


def test_without_a_shared_prefix_choices_spread_evenly() -> None:
    route = router(max_queue=100)
    for name in ("a", "b"):
        join(route, name, max_batch_size=32)
    route.take()
    places = burst(route, 20)
    assert places.count(b"a") == places.count(b"b") == 10


def test_a_burst_spreads_evenly_whatever_the_last_steps_of_equals_were() -> None:
    """At the beginning of a burst one replica's heartbeat reports a prefill, another's still single tokens: they differ by a factor of
    twenty."""
    route = router(max_queue=400)
    for name, step_ms in (("a", 180.0), ("b", 9.0), ("c", 8.0)):
        join(route, name, max_batch_size=128)
        route.hear(name.encode(), "", beat(boot=f"{name}1", step_ms=step_ms), 0.0)
    route.take()
    places = burst(route, 300)
    assert {name: places.count(name) for name in (b"a", b"b", b"c")} == {b"a": 100, b"b": 100, b"c": 100}


def test_replicas_of_another_kind_are_chosen_by_their_pace() -> None:
    route = router(max_queue=400)
    for name, step_ms, tp in (("a", 10.0, 2), ("b", 20.0, 1)):
        join(route, name, max_batch_size=128, max_num_tokens=2048, tp=tp)
        route.hear(name.encode(), "", beat(boot=f"{name}1", step_ms=step_ms), 0.0)
    route.take()
    places = burst(route, 120)
    assert 75 <= places.count(b"a") <= 85, "two thirds go to the one that is twice as fast"
