"""The stories of requests: what is told while a request lives and after its end, under which id, and how many are kept."""

from __future__ import annotations

import pytest

from orchestrator.router.core import history
from orchestrator.router.core.history import ChoiceStory, RequestHistory, RequestStory
from tests.support.router_core import accept, ask, join, router, sent, tokens
from workers.protocol.messages import (
    Submit,
)


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
