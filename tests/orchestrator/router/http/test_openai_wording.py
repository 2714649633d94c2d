"""Logprobs in the older form of completions: however alike tokens look, each has its entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.router.core.request import RouterRequest
from tests.support.scripted_router import Play, ServedDoor

#: Of these bytes, none is a text of its own but the last; the three ids before it are special tokens.
TEXT = [*"日本".encode(), 256, 257, 258, ord("!")]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    def play(request: RouterRequest, choice: int) -> Play:
        return Play(text=TEXT, burst=2)

    with ServedDoor(tmp_path_factory.mktemp("logprobs")) as door:
        door.dispatcher.script = play
        yield door


def logprobs(door: ServedDoor, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 32, "logprobs": 5, **fields}
    found: dict[str, Any] = door.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    return found


def test_no_two_tokens_of_a_position_are_one_entry(door: ServedDoor) -> None:
    found = logprobs(door)
    assert [len(top) for top in found["top_logprobs"]] == [5] * len(TEXT)
    assert found["tokens"][:2] == ["bytes:\\xe6", "bytes:\\x97"] and found["tokens"][-1] == "!"
    for token, own, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == own, "a client looks a token up among its alternatives"
    # The ids beyond the vocabulary have no text at all: the likeliest keeps the empty one.
    assert list(found["top_logprobs"][-2]) == ["<|im_end|>", "", "token_id:260", "token_id:261", "token_id:262"]


def test_tokens_by_their_ids(door: ServedDoor) -> None:
    found = logprobs(door, return_tokens_as_token_ids=True)
    assert found["tokens"] == [f"token_id:{id}" for id in TEXT]
    assert [list(top) for top in found["top_logprobs"]] == [[f"token_id:{id + more}" for more in range(5)] for id in TEXT]
    assert found["text_offset"] == logprobs(door)["text_offset"]


def test_chats_name_every_token_apart_by_its_bytes(door: ServedDoor) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 5}
    for named in (False, True):
        answer = door.http.post("/v1/chat/completions", json={**body, "return_tokens_as_token_ids": named}).json()
        first = answer["choices"][0]["logprobs"]["content"][0]
        assert len(first["top_logprobs"]) == 5 and first["bytes"] == [0xE6]
        assert first["token"] == ("token_id:230" if named else "\ufffd")


def test_a_prompt_alone_is_scored(door: ServedDoor) -> None:
    """``echo`` and ``max_tokens`` 0: how evaluation harnesses score a text."""
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "hi there", "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
        response = door.http.post("/v1/completions", json=body)
        assert door.dispatcher.asks[-1].params.max_tokens == 0
        if stream:
            assert response.text.count("data: ") == 3 and '"text":"hi there"' in response.text and '"length"' in response.text
            continue
        answer = response.json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("hi there", "length", 0)
        assert choice["logprobs"]["tokens"] == list("hi there") and choice["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_in_a_stream_join_to_those_of_the_whole_answer(door: ServedDoor, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": ["hi", "ho"]}
    body = {"model": "tiny", **prompt, "n": 2, "max_tokens": 32, "stop": "!", "return_token_ids": True}
    whole = door.http.post(path, json=body).json()
    expected = {choice["index"]: (choice["token_ids"], choice.get("prompt_token_ids")) for choice in whole["choices"]}
    assert all(ids == TEXT for ids, _ in expected.values())
    joined: dict[int, list[int]] = {index: [] for index in expected}
    prompts: dict[int, list[int]] = {}
    for line in door.http.post(path, json={**body, "stream": True}).text.splitlines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice.get("token_ids", [])
            if (ids := choice.get("prompt_token_ids", chunk.get("prompt_token_ids"))) is not None:
                assert choice["index"] not in prompts, "the prompt's ids come once"
                prompts[choice["index"]] = ids
    assert joined == {index: ids for index, (ids, _) in expected.items()}
    assert prompts == {index: whole["prompt_token_ids"] if chat else ids for index, (_, ids) in expected.items()}
