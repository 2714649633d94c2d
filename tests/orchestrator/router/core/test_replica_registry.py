"""The replica table: epoch fencing, identity, and the two ways to be lost while connected."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from orchestrator.router.core.actions import FailChoice
from orchestrator.router.core.replica_registry import FAULT_LIMIT, KEPT_LOST_S, HelloAccepted, HelloRefused, Replica, ReplicaRegistry
from tests.support.router_core import HELLO, accept, ask, beat, join, router, sent, tokens, where
from workers.protocol.errors import Overloaded
from workers.protocol.messages import (
    PROTOCOL,
    Bye,
    Failed,
    Hello,
    RouterHeartbeat,
    Submit,
)


def hello(**change: Any) -> Hello:
    return msgspec.structs.replace(HELLO, **change)


def registry() -> tuple[ReplicaRegistry, Replica]:
    table = ReplicaRegistry(replica_timeout_s=2.0, hang_floor_s=10.0)
    joined = table.hello(b"p1", "key-a", HELLO, 0.0)
    assert isinstance(joined, HelloAccepted) and joined.fresh and joined.replaced is None
    return table, joined.replica


def test_the_largest_epoch_of_a_name_is_kept_as_long_as_the_name() -> None:
    table, old = registry()
    newer = table.hello(b"p2", "key-a", hello(boot="b2", epoch=6), 1.0)
    assert isinstance(newer, HelloAccepted) and newer.replaced is old
    table.lose(newer.replica, "gone", 2.0)
    assert table.hello(b"p3", "key-a", HELLO, 3.0) == HelloRefused("stale")
    assert table.speaker(b"p1", "key-a", "b1") == (None, False), "the fenced process is heard no more"
    table.check()
    table.forget(2.0 + KEPT_LOST_S)
    assert list(table.replicas) == ["a"]
    table.forget(2.1 + KEPT_LOST_S)
    assert not table.replicas and table.speaker(b"p2", "key-a", "b2") == (None, False)
    assert isinstance(table.hello(b"p4", "key-a", hello(boot="b4", epoch=1), 9.0), HelloAccepted)
    table.forget(9.0 + 2 * KEPT_LOST_S)
    assert list(table.replicas) == ["a"], "who is not lost stays, however long it was silent"
    table.check()


def test_a_live_name_belongs_to_its_key_and_a_process_to_its_name() -> None:
    table, _ = registry()
    assert table.hello(b"p2", "key-b", hello(boot="b2", epoch=9), 1.0) == HelloRefused("denied")
    assert table.hello(b"p1", "key-a", hello(replica="other"), 1.0) == HelloRefused("denied")
    assert table.hello(b"p2", "key-a", hello(boot="b2", protocol=PROTOCOL + 1, epoch=9), 1.0) == HelloRefused("protocol")
    assert table.speaker(b"p1", "key-b", "b1") == (None, False), "the address alone proves nothing"
    table.check()


def test_one_long_step_is_not_the_pace_of_a_replica() -> None:
    _, replica = registry()
    assert replica.step_ms == 0.0
    for step in range(20):
        replica.heartbeat(beat(step=step, step_ms=7.0), 0, [], step * 0.2)
    for step in range(20, 24):  # a burst of prompts
        replica.heartbeat(beat(step=step, step_ms=200.0), 0, [], step * 0.2)
    assert replica.step_ms == 7.0
    for _ in range(20):  # no step since: no news
        replica.heartbeat(beat(step=23, step_ms=200.0), 0, [], 5.0)
    assert replica.step_ms == 7.0
    for step in range(24, 40):  # it has become slow
        replica.heartbeat(beat(step=step, step_ms=30.0), 0, [], step * 0.2)
    assert replica.step_ms == 30.0


def test_a_silent_reconnect_moves_the_address() -> None:
    table, replica = registry()
    assert table.speaker(b"p9", "key-a", "b1") == (replica, True)
    assert table.at(b"p9") is replica and table.at(b"p1") is None
    again = table.hello(b"p10", "key-a", HELLO, 1.0)
    assert again == HelloAccepted(replica, None, False)
    table.check()


def test_an_address_has_one_owner() -> None:
    table, first = registry()
    second = table.hello(b"p1", "key-b", hello(replica="b", boot="b2"), 1.0)
    assert isinstance(second, HelloAccepted)
    assert table.at(b"p1") is second.replica and first.peer == b""
    table.check()
    assert table.speaker(b"p2", "key-a", "b1") == (first, True)
    table.check()


def test_a_hung_step_is_told_from_a_long_one() -> None:
    table, replica = registry()
    assert table.judge(replica, beat(busy_ms=9_999.0), 1.0) == ""
    assert "no progress" in table.judge(replica, beat(busy_ms=10_001.0), 1.0)
    assert table.judge(replica, beat(busy_ms=39_000.0, predicted_ms=10_000.0), 1.0) == "", "four times its prediction is allowed"


def test_lost_by_silence_and_back_by_a_heartbeat() -> None:
    table, replica = registry()
    assert table.silent(2.0) == [] and table.silent(2.1) == [replica]
    assert table.lose(replica, "silent", 2.1) and not table.lose(replica, "silent", 2.2)
    assert replica.free_places == 0 and table.serving("m") == []
    assert table.judge(replica, beat(), 3.0) == "" and replica.state == "ready"
    assert table.judge(replica, beat(draining=True), 3.0) == ""
    assert replica.state == "draining" and replica.free_places == 0


def test_choices_of_other_routers_count() -> None:
    table, replica = registry()
    assert replica.free_places == 5, "the batch and one choice of lookahead"
    replica.add_stream(1, 10)
    replica.add_stream(2, 20)
    replica.heartbeat(beat(running=3, waiting=1, prefill_tokens=25), accepted=1, waiting=[1], now=1.0)
    assert replica.others == 3 and replica.occupancy == 5 and replica.free_places == 0
    assert replica.queued_tokens == 30 + 15
    replica.heartbeat(beat(running=1, prefill_tokens=25), accepted=1, waiting=[1], now=1.0)
    assert replica.queued_tokens == 30, "without others it is this router's own choice, told of late"
    table.check()


def test_stale_hellos_are_told_to_leave_and_strangers_to_greet() -> None:
    route = router()
    join(route, "a", epoch=2)
    route.take()
    join(route, "a", epoch=1)
    (bye,) = sent(route.take(), Bye)
    assert bye.reason == "stale"
    route.hear(b"x", "", beat(boot="unknown"), 0.0)
    (peers,) = sent(route.take(), RouterHeartbeat)
    assert peers.boot == "R"


def test_a_choice_counts_as_waiting_until_its_first_token_whatever_a_heartbeat_says() -> None:
    route = router(max_queue=100)
    join(route, "a", max_batch_size=32)
    route.submit(ask(list(range(1, 41))), 0.0)
    (submit,) = sent(route.take(), Submit)
    replica = route.registry.replicas["a"]
    accept(route, submit, place="a")
    route.hear(b"a", "", beat(boot="a1", step=1, running=0, prefill_tokens=0), 0.1)  # as of the step before it
    assert replica.queued_tokens == 40
    route.hear(b"a", "", beat(boot="a1", step=1, running=1, prefill_tokens=10), 0.1)  # the first chunk of it is computed
    assert replica.queued_tokens == 10
    route.hear(b"a", "", tokens("a1", submit, 0, [65]), 0.2)
    assert replica.queued_tokens == 0
    route.hear(b"a", "", beat(boot="a1", step=1, running=1, prefill_tokens=40), 0.3)  # nor is it counted twice
    assert replica.queued_tokens == 0
    route.check()


def test_logits_that_are_not_finite_cost_a_replica_the_choice_for_a_while() -> None:
    route = router(max_queue=8)
    join(route, "a")
    join(route, "b")

    def places(count: int, now: float) -> set[bytes]:
        for _ in range(count):
            route.submit(ask(), now)
        actions = route.take()
        for submit, place in zip(sent(actions, Submit), where(actions), strict=True):
            code = "nan_logits" if place == b"a" and now < 50 else "engine_fault"
            end = Failed(boot=f"{place.decode()}1", stream=submit.stream, attempt=1, code=code, message="")
            route.hear(place, "", end, now)
        assert [type(action) for action in route.take()] == [FailChoice] * count
        return set(where(actions))

    def live(now: float) -> None:
        for name in "ab":
            route.hear(name.encode(), "", beat(boot=f"{name}1"), now)
        route.tick(now)
        route.take()

    for second in range(3):
        live(float(second))
        places(2, float(second))
    assert route.counts["quarantines"] == 1 and route.registry.replicas["a"].quarantined
    assert places(4, 50.0) == {b"b"}
    route.unreachable(b"b", 51.0)
    route.submit(ask(), 51.0)
    assert where(route.take()) == [b"a"], "it is the last one"
    live(62.5)
    assert not route.registry.replicas["a"].quarantined
    route.check()


def test_admission_counts_no_places_of_a_quarantined_replica() -> None:
    """A choice is not sent there while another replica is ready, so it would wait in the queue above its bound."""
    route = router(max_queue=2)
    join(route, "a")
    for _ in range(FAULT_LIMIT):
        route.submit(ask(), 0.0)
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", Failed(boot="a1", stream=submit.stream, attempt=1, code="nan_logits", message=""), 0.0)
    join(route, "b", max_batch_size=1)
    assert route.registry.replicas["a"].quarantined and route.registry.replicas["a"].free_places > 2
    route.submit(ask(n=2), 1.0)
    assert where(route.take()) == [b"b", b"b"], "one place and one of lookahead"
    with pytest.raises(Overloaded):
        route.submit(ask(n=3), 1.0)
    route.submit(ask(n=2), 1.0)
    assert where(route.take()) == [] and route.core.waiting("m") == 2
    route.check()
