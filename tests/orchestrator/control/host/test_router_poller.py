"""Which gangs the routers have lost, from their reports."""

from __future__ import annotations

from orchestrator.control.host.router_poller import given_up
from workers.protocol.status import ReplicaStatus, RouterStatus, RoutingState


def report(**replicas: tuple[RoutingState, float]) -> RouterStatus:
    """``replicas``: name -> state, and for how many seconds."""
    rows = [ReplicaStatus(name=name, model="m", state=state, age_s=age_s, epoch=1) for name, (state, age_s) in replicas.items()]
    return RouterStatus(router="r", replicas=tuple(rows))


def test_a_gang_is_given_up_when_all_who_know_it_lost_it_for_good() -> None:
    one = report(here=("ready", 60.0), gone=("lost", 2.0), draining=("draining", 9.0), fresh=("lost", 0.5), half=("lost", 9.0))
    other = report(gone=("lost", 3.0), half=("ready", 1.0))
    assert given_up([one, other]) == {("gone", 1)}
    assert given_up([]) == frozenset()


def test_a_leader_that_is_about_to_connect_again_is_not_given_up() -> None:
    """A router that was frozen loses its leaders by their old connections, and has them back within a second."""
    assert given_up([report(a=("lost", 1.0))]) == frozenset()
    assert given_up([report(a=("lost", 5.0)), report(a=("lost", 1.0))]) == frozenset()
