"""One router address over time: greeted once a connection, lost once, reopened with a growing pause."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.serving.router_link import PAUSE_MAX_S, PAUSE_MIN_S, CloseSocket, LinkAction, OpenSocket, RouterLink, RouterLost, SendHello


def live(now: float = 0.0) -> RouterLink:
    link = RouterLink(silence_s=2.0)
    assert link.tick(now) == [OpenSocket()] and link.connected(now) == [SendHello()] and link.heard("b1", now) == []
    assert (link.state, link.boot) == ("live", "b1")
    return link


def test_silence_loses_a_router_once_and_reconnects() -> None:
    link = live()
    assert link.heard("b1", 1.5) == [] and link.tick(3.0) == []
    assert link.tick(3.6) == [RouterLost("b1"), CloseSocket()]
    assert link.tick(3.6) == [] and not link.up
    assert link.tick(3.6 + PAUSE_MIN_S) == [OpenSocket()] and link.connected(4.0) == [SendHello()]


def test_a_changed_nonce_is_another_router_and_is_greeted() -> None:
    link = live()
    assert link.heard("b2", 1.0) == [RouterLost("b1"), SendHello()]
    assert link.heard("b2", 1.1) == [] and link.boot == "b2"


def test_a_reconnect_behind_the_sockets_back_is_a_loss() -> None:
    assert live().connected(1.0) == [RouterLost("b1"), CloseSocket()]


def test_a_router_that_never_answers_is_tried_ever_more_slowly() -> None:
    link, now, pauses = RouterLink(silence_s=2.0), 0.0, []
    for _ in range(8):
        assert link.tick(now) == [OpenSocket()] and link.connected(now) == [SendHello()]
        assert link.tick(now + 2.1) == [CloseSocket()]
        now += 2.1
        begin = now
        while not link.tick(now + 0.0499):
            now += 0.05
        pauses.append(now - begin)
        link.broken(now)
        now += PAUSE_MAX_S + 0.05
    assert pauses == sorted(pauses) and max(pauses) <= PAUSE_MAX_S + 0.05


@given(st.lists(st.sampled_from(["connected", "broken", "heard1", "heard2", "tick", "wait"]), max_size=60))
def test_every_boot_is_lost_at_most_once_for_each_time_it_was_live(events: list[str]) -> None:
    link, now, known, opened = RouterLink(silence_s=2.0), 0.0, "", False
    for event in events:
        now += 3.0 if event == "wait" else 0.05
        actions: list[LinkAction] = []
        match event:
            case "connected":
                actions = link.connected(now) if opened else []
            case "broken":
                actions = link.broken(now)
            case "heard1" | "heard2":
                actions = link.heard(event, now)
            case _:
                actions = link.tick(now)
        for action in actions:
            match action:
                case RouterLost(boot=boot):
                    assert boot == known
                    known = ""
                case OpenSocket():
                    assert not opened and not known
                    opened = True
                case CloseSocket():
                    assert opened and not known, "sequences are released before the socket is"
                    opened = False
                case SendHello():
                    assert opened
        known = link.boot
        assert link.up <= opened and bool(link.boot) == (link.state == "live")
