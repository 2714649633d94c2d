"""The table of sessions: its keys, its bound, and what it does to the choice of a replica."""

from __future__ import annotations

import pytest

from orchestrator.router.core import session_table
from orchestrator.router.core.session_table import SessionTable, session_key
from tests.support.router_core import ask, join, router, sent, where
from workers.protocol.messages import Failed, Submit


def test_a_session_is_one_of_a_model_and_a_tenant() -> None:
    """No two of them share a session, and none is kept as the client wrote it."""
    requests = [ask(affinity="s"), ask(affinity="t"), ask(affinity="s", model="m2"), ask(affinity="s", salt="tenant")]
    keys = [session_key(request) for request in requests]
    assert len(set(keys)) == len(keys) and all(key != "s" and len(key) == 24 for key in keys)
    assert session_key(ask(affinity="s", prompt=[9], request_id="another")) == keys[0]
    assert session_key(ask()) == "" and session_key(ask(affinity="\ud800")) != ""


def test_the_last_replica_of_a_session_is_known() -> None:
    sessions = SessionTable()
    assert sessions.replica_of("s") == ""
    sessions.note_sent("s", "a")
    sessions.note_sent("s", "b")
    sessions.note_sent("", "a")
    assert sessions.replica_of("s") == "b" and sessions.replica_of("") == ""
    assert SessionTable(sessions.snapshot()).snapshot() == {"s": "b"}


def test_of_too_many_sessions_the_least_recently_used_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_table, "MAX_SESSIONS", 3)
    sessions = SessionTable()
    for session in ("s", "t", "u", "s", "v"):
        sessions.note_sent(session, "a")
    assert list(sessions.snapshot()) == ["u", "s", "v"]


def test_the_next_turn_of_a_session_goes_where_the_last_one_ran() -> None:
    """Both replicas are idle, and without a session the one that is unused longest would be taken."""
    route = router()
    for name in ("a", "b"):
        join(route, name)
    route.take()
    places = []
    for session in ("other", "s"):
        route.submit(ask(affinity=session), 0.0)
        actions = route.take()
        (place,), (submit,) = where(actions), sent(actions, Submit)
        end = Failed(boot=f"{place.decode()}1", stream=submit.stream, attempt=1, code="engine_fault", message="")
        route.hear(place, "", end, 1.0)
        route.take()
        places.append(place)
    assert places == [b"a", b"b"]
    route.submit(ask([9], affinity="s"), 2.0)
    assert where(route.take()) == [b"b"] and route.stats["m"].decisions["session"] == 1
    route.submit(ask([9]), 2.0)
    assert where(route.take()) == [b"a"]
