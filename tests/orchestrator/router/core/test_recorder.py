"""The recorder: what it keeps, what it drops, and what it never holds; and the stories of requests."""

from __future__ import annotations

import msgspec
import pytest

from orchestrator.router.core import history
from orchestrator.router.core.history import ChoiceStory, RequestHistory, RequestStory
from orchestrator.router.core.recorder import EventRecorder, dump_lines, read_dump, user_digest
from orchestrator.router.core.request_table import KEPT_ATTEMPTS
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
        route.hear(name.encode(), "PUBLICKEY", hello_of(name), 0.0)
    body = ask([77001, 77002, 77003], client="CLIENTKEY", salt="SALT", affinity="AFFINITY", emitted=[[77004]])
    route.submit(body, 0.0)
    (submit,) = sent(route.take(), Submit)
    place = "a" if submit.stream in route.registry.replicas["a"].streams else "b"
    scores = Logprobs(token=77005, logprob=-0.5, top_ids=[77006], top_logprobs=[-0.5])
    message = msgspec.structs.replace(
        tokens(f"{place}1", submit, 1, [77005]), logprobs=[[scores]], prompt_logprobs=[(submit.stream, [scores])]
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


def test_a_story_is_known_while_a_request_lives_and_after_its_end() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(request_id="mine"), 1.0)
    (submit,) = sent(route.take(), Submit)
    (story,) = route.core.stories("mine")
    assert story.choices[0].phase == "sent" and not story.choices[0].end
    accept(route, submit, place="a")
    route.hear(b"a", "", tokens("a1", submit, 0, [5, 6]), 2.0)
    route.unreachable(b"a", 3.0)
    join(route, "b", now=4.0)
    route.submit(ask(request_id="mine", n=1), 4.5)
    route.cancel(1, 5.0)
    ended, live = route.core.stories("mine")
    first, second = ended.choices[0].attempts
    assert (first.replica, first.first_at, first.cause, first.ended_at) == ("a", 2.0, "unreachable", 3.0)
    assert (second.replica, second.emitted_before, second.queued_at, second.sent_at) == ("b", 2, 3.0, 4.0)
    assert (ended.choices[0].end, ended.choices[0].ended_at, ended.choices[0].output_tokens) == ("cancelled", 5.0, 2)
    assert live.number == 2 and not live.choices[0].end
    assert route.core.stories("other") == []


def test_a_story_is_found_by_the_id_that_log_lines_have() -> None:
    """Over HTTP that is ``x-request-id``, which is not the id in the body of the answer."""
    route = router()
    join(route, "a")
    route.submit(ask(request_id="cmpl-1", marks=("from-a-header", "")), 0.0)
    route.submit(ask(request_id="own", marks=("own", "")), 0.0)
    for ended in (False, True):
        (story,) = route.core.stories("from-a-header")
        assert (story.request_id, story.caller_id, bool(story.choices[0].end)) == ("cmpl-1", "from-a-header", ended)
        assert route.core.stories("cmpl-1") == [story]
        (own,) = route.core.stories("own")
        assert own.caller_id == "" and route.core.stories("") == []
        route.cancel(1, 1.0)
        route.cancel(2, 1.0)


def test_of_many_attempts_the_first_and_the_last_are_kept() -> None:
    route = router()
    join(route, "a")
    route.submit(ask(), 0.0)
    for second in range(1, 200):
        (submit,) = sent(route.take(), Submit)
        route.hear(b"a", "", Failed(boot="a1", stream=submit.stream, attempt=submit.attempt, code="not_found", message=""), second / 10)
    (story,) = route.core.stories("q")
    (choice,) = story.choices
    assert len(choice.attempts) == KEPT_ATTEMPTS and choice.dropped_attempts == 200 - KEPT_ATTEMPTS
    assert [attempt.number for attempt in choice.attempts[:2]] == [1, 138] and choice.attempts[-1].number == 200
    route.check()


def test_the_history_is_bounded_by_number_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def story(index: int, detail: str = "") -> RequestStory:
        choice = ChoiceStory(phase="ended", output_tokens=1, end="failed", detail=detail)
        return RequestStory(
            request_id=f"q{index}", number=index, model="m", arrived_at=0.0, prompt_tokens=1, max_tokens=1, choices=[choice]
        )  # fmt: skip

    kept = RequestHistory()
    for index in range(history.KEPT_REQUESTS + 5):
        kept.add(story(index))
    assert len(kept) == history.KEPT_REQUESTS and not kept.find("q4") and kept.find("q5") == [story(5)]
    monkeypatch.setattr(history, "KEPT_BYTES", 10_000)
    kept.add(story(0, "x" * 9_000))
    assert len(kept) < 20 and kept.find("q0")
