"""Limits of API keys over HTTP: refusals and headers in OpenAI's form, and what a request of each kind counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from orchestrator.auth.api_keys import ApiKey, ApiKeys, KeyLimits, KeyTerms, mint
from tests.support.scripted_router import Play, ServedDoor
from workers.protocol.errors import Overloaded

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
#: The scripted answer.
OUTPUT = len("Hello, world")


class KeyedDoor:
    """A door whose one key gets other limits for each test, as a change of the keys file gives them. A key of its own each."""

    def __init__(self, door: ServedDoor) -> None:
        self.door = door

    def limit(self, priority: int = 0, **limits: int) -> str:
        """A new key."""
        terms = KeyTerms(limits=KeyLimits(**limits), most_urgent=priority, weight=2.0)
        key, row = mint("alice", None, 0, terms)
        assert self.door.keys is not None
        self.door.keys.replace([row])
        self.door.dispatcher.reset()
        return key

    def ask(self, key: str, path: str = CHAT, **fields: Any) -> httpx.Response:
        return self.door.http.post(path, json=BODY | fields, headers={"authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("limits"), ApiKeys(list[ApiKey]())) as door:
        yield KeyedDoor(door)


def test_a_refusal_is_in_openais_form(keyed: KeyedDoor) -> None:
    key = keyed.limit(rpm=2)
    first = keyed.ask(key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2" and first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].startswith(("59", "1m0"))
    assert not [name for name in first.headers if name.startswith("x-ratelimit") and name.endswith("tokens")]
    assert keyed.ask(key).status_code == 200
    refused = keyed.ask(key)
    assert refused.status_code == 429 and 50 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and error["type"] == "requests" and "its limit is 2" in error["message"]


def test_the_openai_package_raises_its_own_error(keyed: KeyedDoor) -> None:
    key = keyed.limit(rpm=1)
    client = openai.OpenAI(base_url=f"{keyed.door.url}/v1", api_key=key, max_retries=0)
    client.chat.completions.create(**BODY)  # type: ignore[call-overload]
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**BODY)  # type: ignore[call-overload]
    assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"]


def remaining(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-tokens"])


def test_tokens_are_reserved_and_what_was_not_used_comes_back(keyed: KeyedDoor) -> None:
    key = keyed.limit(tpm=10_000)
    first = keyed.ask(key)
    prompt = len(keyed.door.dispatcher.asks[0].prompt_ids)
    assert remaining(first) == 10_000 - prompt - 20, "the headers go out when it is admitted"
    second = keyed.ask(key)
    assert remaining(second) == 10_000 - (prompt + OUTPUT) - (prompt + 20)
    third = keyed.ask(key, stream=True, n=3)
    assert remaining(third) == 10_000 - 2 * (prompt + OUTPUT) - (prompt + 3 * 20)
    fourth = keyed.ask(key, stop=["wor"])
    assert remaining(fourth) == 10_000 - 2 * (prompt + OUTPUT) - (prompt + 3 * OUTPUT) - (prompt + 20)
    fifth = keyed.ask(key, "/v1/completions", prompt=["ab", "cde"], messages=None)
    used = 3 * prompt + 5 * OUTPUT + prompt + len("Hello, wor")
    assert remaining(fifth) == 10_000 - used - (5 + 2 * 20)


def test_a_request_without_max_tokens_reserves_a_usual_answer(keyed: KeyedDoor) -> None:
    key = keyed.limit(tpm=1200)
    answer = keyed.ask(key, max_tokens=None)
    assert answer.status_code == 200, "the rest of the context may be far more than the limit"
    keyed.door.dispatcher.script = lambda ask, choice: Play(text="x" * 900)
    assert keyed.ask(key, max_tokens=None).status_code == 200
    assert keyed.ask(key, max_tokens=300).status_code == 429, "its answer counts, though it was not asked for in advance"


def test_a_request_larger_than_the_limit_is_not_to_be_tried_again(keyed: KeyedDoor) -> None:
    answer = keyed.ask(keyed.limit(tpm=15))
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "tokens"
    assert "retry-after" not in answer.headers and answer.headers["x-should-retry"] == "false"


def test_requests_at_once_are_free_again_when_they_end(keyed: KeyedDoor) -> None:
    key = keyed.limit(concurrency=1)
    keyed.door.dispatcher.script = lambda ask, choice: Play(hang=True)
    with keyed.door.http.stream("POST", CHAT, json=BODY | {"stream": True}, headers={"authorization": f"Bearer {key}"}) as stream:
        pieces = stream.iter_raw()  # a generator that is dropped would close the connection
        next(pieces)
        refused = keyed.ask(key)
        assert refused.status_code == 429 and "at once" in refused.json()["error"]["message"]
    assert keyed.door.dispatcher.cancelled.wait(5)
    keyed.door.dispatcher.script = lambda ask, choice: Play()
    assert keyed.ask(key).status_code == 200


def test_a_request_that_the_queue_refuses_gives_its_tokens_back(keyed: KeyedDoor) -> None:
    key = keyed.limit(tpm=100, rpm=10)
    keyed.door.dispatcher.refusal = Overloaded("full", retry_after=1.0)
    for _ in range(5):
        assert keyed.ask(key).json()["error"]["code"] == "overloaded"
    keyed.door.dispatcher.refusal = None
    answer = keyed.ask(key)
    assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == "4"


def test_a_key_decides_weight_and_the_smallest_priority(keyed: KeyedDoor) -> None:
    for most_urgent, asked, given in ((0, -5, 0), (0, 3, 3), (-2, -5, -2), (-2, -1, -1)):
        keyed.ask(keyed.limit(most_urgent), priority=asked)
        (ask,) = keyed.door.dispatcher.asks
        assert (ask.priority, ask.weight, ask.tenant) == (given, 2.0, "alice")


def test_kserve_requests_count_too(keyed: KeyedDoor) -> None:
    key = keyed.limit(rpm=1)
    for status in (200, 429):
        body = {"text_input": "hi", "parameters": {"max_tokens": 5}}
        answer = keyed.door.http.post("/v2/models/tiny/generate", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status and answer.headers["x-ratelimit-limit-requests"] == "1"


def test_what_generates_nothing_is_not_limited(keyed: KeyedDoor) -> None:
    key = keyed.limit(rpm=1)
    for _ in range(3):
        assert keyed.door.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
