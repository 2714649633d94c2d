"""Requests as guidellm, aiperf, lm-eval, langchain and vLLM's own clients send them (recorded), and what these read of the answer."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.support.scripted_router import Play, ServedDoor

HELLO = [{"role": "user", "content": "hi"}]


def events(response: httpx.Response) -> list[Any]:
    """Data of all events, the last being ``[DONE]``, which is left out."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post(door: ServedDoor, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    response = door.http.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def test_guidellm(door: ServedDoor) -> None:
    assert door.http.get("/health").status_code == 200
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 5,
        "stop": None,
        "ignore_eos": True,
    }
    chunks = events(post(door, "/v1/chat/completions", body))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "Hello"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 5, 5, 5]
    assert chunks[-1]["choices"] == []
    ask = door.dispatcher.asks[0]
    assert ask.params.ignore_eos and ask.params.stop_ids == ()
    assert b"one\ntwo" in bytes(id for id in ask.prompt_ids if id < 256)


def test_aiperf(door: ServedDoor) -> None:
    assert "trireme_time_to_first_token_seconds_bucket" in door.http.get("/metrics").text
    body = {
        "messages": [{"role": "user", "name": "", "content": "hi"}],
        "model": "tiny",
        "stream": True,
        "max_completion_tokens": 4,
        "stream_options": {"include_usage": True},
    }
    response = post(door, "/v1/chat/completions", body, **{"X-Request-ID": "b6a3-1", "X-Correlation-ID": "session-9"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "b6a3-1"
    assert events(response)[-1]["usage"]["completion_tokens"] == 4
    assert door.dispatcher.asks[0].affinity == "session-9"


def test_lm_eval_scores_from_echoed_logprobs(door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="!")
    body = {"model": "tiny", "prompt": ["ab c", "x"], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(door, "/v1/completions", body).json()
    first, second = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert first["text"] == "ab c!" and second["text"] == "x!"
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["a", "b", " ", "c", "!"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"b": -0.5}, {" ": -0.5}, {"c": -0.5}, {"!": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert [ask.params.seed for ask in door.dispatcher.asks] == [1234, 1234]
    assert {ask.params.prompt_logprobs for ask in door.dispatcher.asks} == {1}


def test_echoed_logprobs_in_a_stream(door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="!")
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 1, "logprobs": 0, "echo": True, "stream": True}
    chunks = events(post(door, "/v1/completions", body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab!"
    offsets = [offset for chunk in chunks for offset in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == [0, 1, 2]


def test_lm_eval_generation(door: ServedDoor) -> None:
    body = {"messages": HELLO, "model": "tiny", "max_tokens": 256, "temperature": 0, "stop": ["<|im_end|>", "\n\n"], "seed": 1234}
    choice = post(door, "/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, world"
    assert door.dispatcher.asks[0].params.stop_ids == (258, 256)


def test_langchain_structured_output(door: ServedDoor) -> None:
    schema = {"title": "Person", "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    door.dispatcher.script = lambda ask, choice: Play(text='{"name":"Ada"}')
    body = {
        "messages": HELLO,
        "model": "tiny",
        "stream": False,
        "max_completion_tokens": 14,
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema, "name": "Person", "strict": True}},
    }
    choice = post(door, "/v1/chat/completions", body).json()["choices"][0]
    assert json.loads(choice["message"]["content"]) == {"name": "Ada"}
    assert choice["finish_reason"] == "stop"


def test_langchain_tools_turn(door: ServedDoor) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]
    body = {"messages": messages, "model": "tiny", "tools": tools, "tool_choice": "auto", "parallel_tool_calls": False}
    assert post(door, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "Hello, world"
    prompt = bytes(id for id in door.dispatcher.asks[0].prompt_ids if id < 256).decode()
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\n42\n</tool_response>" in prompt


def test_vllm_dialect(door: ServedDoor) -> None:
    body = {
        "model": "tiny-alias",
        "prompt": "hi",
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "max_tokens": 9,
        "stop_token_ids": [33],
        "structured_outputs": {"regex": "[a-z]+"},
        "logit_bias": {"65": -100},
        "prompt_logprobs": 2,
        "cache_salt": "tenant-a",
        "user": "someone",
        "store": True,
    }
    answer = post(door, "/v1/completions", body).json()
    assert answer["model"] == "tiny-alias"
    assert answer["choices"][0]["prompt_logprobs"][0] is None
    assert answer["choices"][0]["prompt_logprobs"][1]["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
    ask = door.dispatcher.asks[0]
    assert (ask.params.top_k, ask.params.min_p, ask.params.repetition_penalty, ask.params.min_tokens) == (0, 0.1, 1.2, 2)
    assert ask.params.stop_ids == (33, 258, 256) and ask.params.logit_bias == {65: -100.0}
    assert ask.params.guide is not None and ask.params.guide.kind == "regex"
    assert (ask.model, ask.salt, ask.affinity) == ("tiny", door.salting.of("", "tenant-a"), "someone")


def test_tokenize_and_back(door: ServedDoor) -> None:
    found = post(door, "/tokenize", {"model": "tiny", "prompt": "hé"}).json()
    assert found["tokens"] == [104, 195, 169] and found["count"] == 3
    assert post(door, "/detokenize", {"model": "tiny", "tokens": found["tokens"]}).json() == {"prompt": "hé"}
    chat = post(door, "/tokenize", {"model": "tiny", "messages": HELLO}).json()
    assert chat["tokens"][0] == 257


def test_small_endpoints(door: ServedDoor) -> None:
    assert door.http.get("/ping").status_code == 200
    assert door.http.get("/version").json()["version"]
    assert door.http.get("/status").json()["replicas"][0]["name"] == "r0"
    assert door.http.get("/ready").status_code == 200
    door.dispatcher.is_ready = False
    late = door.http.get("/ready")
    assert late.status_code == 503 and late.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/tiny/generate_stream"])
def test_tokens_without_text_do_not_starve_a_stream(door: ServedDoor, path: str) -> None:
    """More special tokens than may be on their way to a reader: there is nothing to send, and still more must come."""
    door.dispatcher.script = lambda ask, choice: Play(text=[256] * 700 + list(b"end"))
    body = {"model": "tiny", "prompt": "x", "text_input": "x", "max_tokens": 703, "ignore_eos": True, "stream": True}
    assert "".join(re.findall(r'"text(?:_output)?":"(.*?)"', post(door, path, body).text)) == "end"
