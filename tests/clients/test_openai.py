"""The unchanged openai package, sync and async, against the HTTP door on a real socket."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.support.scripted_router import CONTEXT, Play, ServedDoor
from workers.protocol.errors import EngineFault, Overloaded, Unavailable

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(door: ServedDoor) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{door.url}/v1", api_key="any", max_retries=0, timeout=20)


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert listed[0].model_extra == {"root": "tiny", "parent": None, "max_model_len": CONTEXT, "default_sampling_params": {}}
    assert client.models.retrieve("tiny-alias").id == "tiny-alias"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_chat(client: openai.OpenAI, door: ServedDoor) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=7, temperature=0, max_completion_tokens=50)
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    ask = door.dispatcher.asks[0]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ask.prompt_ids), 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert (ask.params.seed, ask.params.temperature, ask.params.max_tokens) == (7, 0.0, 50)
    assert ask.request_id == answer.id


def test_chat_takes_what_the_context_leaves(client: openai.OpenAI, door: ServedDoor) -> None:
    client.chat.completions.create(model="tiny", messages=HELLO)
    ask = door.dispatcher.asks[0]
    assert ask.params.max_tokens == CONTEXT - len(ask.prompt_ids)


def test_chat_stream(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="añ🙂b")
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:] if chunk.choices and chunk.choices[0].delta.content]
    assert texts == ["a", "ñ", "🙂", "b"], "a character of several tokens comes whole, others one by one"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8


def test_several_choices(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text=f"choice {choice}")
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=1)
    assert [choice.message.content for choice in answer.choices] == ["choice 0", "choice 1", "choice 2"]
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["choice 0", "choice 1", "choice 2"]


def test_chat_logprobs(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="ab")
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [(entry.token, entry.bytes, entry.logprob) for entry in logprobs.content] == [("a", [97], -0.5), ("b", [98], -0.5)]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["a", "b"]
    streamed = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, stream=True)
    tokens = [entry.token for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []]
    assert tokens == ["a", "b"]


def test_completions(client: openai.OpenAI, door: ServedDoor) -> None:
    answer = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"Hello"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 20)
    assert len({ask.request_id for ask in door.dispatcher.asks}) == 2
    assert client.completions.create(model="tiny", prompt=[104, 105]).choices[0].text == "Hello, world"
    assert door.dispatcher.asks[-1].prompt_ids == [104, 105]
    assert door.dispatcher.asks[-1].params.max_tokens == 16


def test_completions_stream_of_prompt_list(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text=bytes(ask.prompt_ids).decode().upper())
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=["one", "two"], stream=True, echo=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["oneONE", "twoTWO"]


def test_stop_string(client: openai.OpenAI, door: ServedDoor) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, stop=[", w"])
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello", "stop")
    assert choice.model_extra == {"stop_reason": ", w"}
    assert answer.usage is not None and answer.usage.completion_tokens == 8, "up to and including the token that completed it"
    assert door.dispatcher.finished == [(answer.id, 0)], "the choice was ended at the replica"


def test_forced_tool_call(client: openai.OpenAI, door: ServedDoor) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    door.dispatcher.script = lambda ask, choice: Play(text='{"city":"Oslo"}')
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, tool_choice=named)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None and calls[0].function.name == "weather" and json.loads(calls[0].function.arguments) == {"city": "Oslo"}
    assert answer.choices[0].finish_reason == "tool_calls"
    guide = door.dispatcher.asks[0].params.guide
    assert guide is not None and json.loads(guide.text) == parameters
    assert b'"name": "weather"' in bytes(door.dispatcher.asks[0].prompt_ids[1:400]), "a template without tools gets them in the system turn"


def test_automatic_tool_call_in_a_stream(client: openai.OpenAI, door: ServedDoor) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    door.dispatcher.script = lambda ask, choice: Play(text='Sure.<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>')
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Sure."
    called = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in called] == [(0, "f")] + [(0, None)] * 8, "one piece a token"
    assert called[0].id and "".join(call.function.arguments for call in called) == '{"x": 1}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_json_that_is_whole_has_stopped(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text='{"a":1}')
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=7)
    assert answer.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=6)
    assert cut.choices[0].finish_reason == "length"


def test_errors(client: openai.OpenAI, door: ServedDoor) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 1200}])
    assert caught.value.code == "context_length_exceeded" and str(CONTEXT) in caught.value.message and "12" in caught.value.message
    door.dispatcher.refusal = Overloaded("the queue is full", retry_after=7)
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert limited.value.response.headers["retry-after"] == "7"
    door.dispatcher.refusal = Unavailable("no replica")
    with pytest.raises(openai.InternalServerError) as gone:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert gone.value.status_code == 503 and gone.value.response.headers["retry-after"] == "1"
    door.dispatcher.refusal = None
    door.dispatcher.script = lambda ask, choice: Play(text="", error=EngineFault("not finite", code="nan_logits"))
    with pytest.raises(openai.InternalServerError) as fault:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert fault.value.code == "nan_logits", "a failure before the first byte keeps its status"


def test_error_in_a_stream(client: openai.OpenAI, door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="some", error=EngineFault("not finite", code="nan_logits"))
    seen = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
            seen += chunk.choices[0].delta.content or ""
    assert seen == "some" and caught.value.code == "nan_logits"


def test_async_client(door: ServedDoor) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="any", max_retries=0) as client:

            async def one(index: int) -> str:
                stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(index) for index in range(20))))

    assert asyncio.run(talk()) == ["Hello, world"] * 20
