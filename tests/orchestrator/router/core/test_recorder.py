"""The recorder: what it keeps, what it drops, and what it never holds."""

from __future__ import annotations

import msgspec
import pytest

from orchestrator.router.core.recorder import EventRecorder, dump_lines, read_dump, user_digest
from orchestrator.sim.replay import replay
from tests.support.router_core import CoreDriver, accept, ask, beat, hello_of, join, router, sent, tokens
from workers.protocol.errors import Overloaded
from workers.protocol.messages import Done, Failed, Logprobs, Submit, Usage


def replays(recorder: EventRecorder) -> None:
    assert replay(read_dump(dump_lines(recorder.dump(0.0)))).difference == ""


def serve(route: CoreDriver, now: float) -> None:
    """One request from its submission to its end."""
    route.submit(ask(), now)
    (submit,) = sent(route.take(), Submit)
    accept(route, submit, place="a")
    route.hear(b"a", "", tokens("a1", submit, 0, [5, 6]), now)
    end = Done(boot="a1", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=Usage(prompt_tokens=3, output_tokens=2))
    route.hear(b"a", "", end, now)
    route.tick(now)


def test_the_window_is_bounded_by_events_and_begins_with_a_snapshot() -> None:
    route = router()
    recorder = route.record(window_events=50)
    join(route, "a")
    route.take()
    for second in range(100):
        serve(route, float(second))
        found = read_dump(dump_lines(recorder.dump(0.0)))
        kept, all_events = len(found.events), 1 + 5 * (second + 1)
        assert kept + found.header.dropped == all_events
        assert min(all_events, 50) <= kept < 50 + 2 * 30
    assert found.header.dropped > 300 and found.snapshot.table.counts["finished"] > 60
    replays(recorder)


def test_the_window_is_bounded_by_bytes_whatever_the_events_are() -> None:
    route = router()
    recorder = route.record(window_bytes=40_000)
    join(route, "a")
    for second in range(400):
        route.hear(b"a", "", beat(boot="a1", step=second), float(second))
        assert sum(map(len, recorder.dump(0.0)[1:-1])) < 40_000
    replays(recorder)


def test_a_replay_goes_on_from_requests_at_work() -> None:
    """Queued, sent, running, paused, moved: the snapshot is taken with all of them."""
    route = router(max_queue=50)
    for name in ("a", "b"):
        join(route, name, max_batch_size=2)
    for index in range(9):
        route.submit(ask([index] * 40, credit=3 if index == 1 else 100, n=1 + (index == 2), affinity=f"s{index % 2}"), 0.0)
    submits = sent(route.take(), Submit)
    for submit in submits[:3]:
        place = "a" if submit.stream in route.registry.replicas["a"].streams else "b"
        accept(route, submit, place=place)
        route.hear(place.encode(), "", tokens(f"{place}1", submit, 0, [5, 6, 7]), 0.5)
    route.unreachable(b"a", 0.6)
    route.take()
    recorder = route.record()
    snapshot = read_dump(dump_lines(recorder.dump(0.0))).snapshot.table
    assert {choice.phase for request in snapshot.requests for choice in request.choices} >= {"queued", "sent"}
    assert any(snapshot.returned.values()) and any(choice.paused for request in snapshot.requests for choice in request.choices)
    join(route, "c", max_batch_size=4, now=0.7)
    route.hear(b"b", "", beat(boot="b1", step_ms=9.0), 0.8)
    route.credit(2, 5, 0.9)
    route.tick(9.0)
    route.tick(120.0)
    assert route.live == 0
    replays(recorder)


def test_a_refused_request_is_recorded_with_its_error() -> None:
    route = router(max_queue=0)
    recorder = route.record()
    with pytest.raises(Overloaded):
        route.submit(ask(), 0.0)
    (record,) = read_dump(dump_lines(recorder.dump(0.0))).events
    assert record.refused == "overloaded" and not record.actions
    replays(recorder)


def test_a_dump_holds_no_prompt_no_token_no_text_and_no_secret() -> None:
    route = router(max_queue=50)
    recorder = route.record()
    for name in ("a", "b"):
        route.hear(name.encode(), "PUBLICKEY", hello_of(name, vocab_size=100_000), 0.0)
    body = ask([77001, 77002, 77003], client="CLIENTKEY", tenant="TENANTKEY", salt="SALT", affinity="AFFINITY", emitted=[[77004]])
    route.submit(body, 0.0)
    (submit,) = sent(route.take(), Submit)
    place = "a" if submit.stream in route.registry.replicas["a"].streams else "b"
    scores = Logprobs(token=77005, logprob=-0.5, top_ids=[77006], top_logprobs=[-0.5])
    message = msgspec.structs.replace(
        tokens(f"{place}1", submit, 1, [77005]), logprobs=[[scores]], prompt_logprobs=[(submit.stream, [scores] * 3)]
    )
    route.hear(place.encode(), "PUBLICKEY", message, 0.1)
    route.hear(place.encode(), "PUBLICKEY", beat(boot=f"{place}1", prefixes=[77007]), 0.2)
    end = Done(
        boot=f"{place}1",
        stream=submit.stream,
        attempt=1,
        reason="stop",
        usage=Usage(prompt_tokens=3, output_tokens=2),
        stop_id=77008,
        text="TEXT",
    )
    route.hear(place.encode(), "PUBLICKEY", end, 0.3)
    route.submit(body, 0.4)
    (submit,) = sent(route.take(), Submit)
    place = "a" if submit.stream in route.registry.replicas["a"].streams else "b"
    failed = Failed(boot=f"{place}1", stream=submit.stream, attempt=1, code="rejected", message="TEXT of a grammar")
    route.hear(place.encode(), "PUBLICKEY", failed, 0.5)
    dump = b"\n".join(dump_lines(recorder.dump(0.0))).decode()
    for secret in ("7700", "KEY", "SALT", "AFFINITY", "TEXT"):
        assert secret not in dump, secret
    assert user_digest("PUBLICKEY") in dump
    replays(recorder)
