"""Checked bodies and their use, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.auth.api_keys import Salting
from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.frontend.preprocess import CallerContext, PreparedRequest, Preprocessor
from orchestrator.router.frontend.schema import ChatBody, CompletionBody, decode_object, read
from orchestrator.router.frontend.text_models import TextModels
from tests.support.scripted_router import CONTEXT, ScriptedDispatcher, tiny_texts
from workers.protocol.errors import NotFound, Rejected, TooLong, Unavailable
from workers.protocol.messages import GuideSpec, Journal

CALLER = CallerContext(client="test", request_id="r")
SALTING = Salting(b"salt")
#: One loop for all: the processes that render belong to it.
LOOP = asyncio.Runner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextModels]:
    texts = tiny_texts(Path(tmp_path_factory.mktemp("tiny")))
    yield texts
    texts.close()
    LOOP.close()


def chat(**fields: Any) -> ChatBody:
    found = read("chat", decode_object(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()))
    assert isinstance(found, ChatBody)
    return found


def completion(**fields: Any) -> CompletionBody:
    found = read("completions", decode_object(json.dumps({"model": "tiny", "prompt": "hi", **fields}).encode()))
    assert isinstance(found, CompletionBody)
    return found


def ready(texts: TextModels, request: ChatBody | CompletionBody, caller: CallerContext = CALLER) -> PreparedRequest:
    admission = AdmissionSpec(request_timeout_s=30)
    return LOOP.run(Preprocessor(texts, ScriptedDispatcher(), admission, SALTING).prepare(request, caller))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"children": {"items": {"$ref": "#/$defs/leaf"}}},
    "$defs": {"leaf": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json_schema", SCHEMA),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "[a-z]+( [a-z]+)*"}, "regex", "[a-z]+( [a-z]+)*"),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ["a"]),
        ({"structured_outputs": {"json_object": True}}, "json", ""),
    ],
)
def test_every_spelling_of_a_grammar(fields: dict[str, Any], kind: str, text: Any) -> None:
    guide = chat(**fields).guide
    assert guide is not None and guide.kind == kind
    assert (json.loads(guide.text) if isinstance(text, dict | list) else guide.text) == text
    assert completion(**fields).guide == guide


def test_grammar_and_prompts_are_worked_out_once() -> None:
    body = completion(guided_json=SCHEMA, prompt=[[1, 2], [3]])
    assert body.guide is not None and body.guide is body.guide
    assert body.prompts == [[1, 2], [3]] and body.prompts is body.prompts


def test_plain_text_needs_no_grammar() -> None:
    assert chat(response_format={"type": "text"}).guide is None


def test_required_tool_call_is_any_of_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    guide = chat(tools=tools, tool_choice="required").guide
    assert isinstance(guide, GuideSpec)
    names = [option["properties"]["name"]["const"] for option in json.loads(guide.text)["anyOf"]]
    assert names == ["a", "b"]
    assert chat(tools=tools, tool_choice="auto").guide is None


def test_markers_of_calls_are_shown_where_a_request_has_tools(texts: TextModels) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ready(texts, chat(tools=tools)).rule.markers == ("<tool_call>", "</tool_call>")
    assert ready(texts, chat(tools=tools, tool_choice="none")).rule.markers == ready(texts, chat()).rule.markers == ()


def test_unknown_fields_are_told() -> None:
    told: list[list[str]] = []
    read("chat", decode_object(b'{"model":"m","messages":[{"role":"user","content":""}],"x":1,"y":2}'), on_unknown=told.append)
    assert told == [["x", "y"]]


def test_defaults(texts: TextModels) -> None:
    params = ready(texts, completion()).requests[0].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens, params.logprobs, params.guide) == (
        1.0,
        0,
        1.0,
        16,
        None,
        None,
    )
    assert params.stop_ids == (258, 256)
    assert ready(texts, completion(prompt="x" * (CONTEXT - 3))).requests[0].params.max_tokens == 3


def test_seeds(texts: TextModels) -> None:
    assert ready(texts, completion(seed=-1)).requests[0].params.seed == 2**63 - 1
    given = ready(texts, completion(prompt=["a", "b"], seed=5)).requests
    assert [ask.params.seed for ask in given] == [5, 5], "each as if it were asked alone"
    drawn = ready(texts, completion(prompt=["a", "a"])).requests
    assert drawn[0].params.seed != drawn[1].params.seed


def test_a_deadline_reaches_the_core_as_the_caller_gave_it(texts: TextModels) -> None:
    """The core alone cuts it to the admission limit."""
    deadlines = [
        ready(texts, chat(), CallerContext(client="c", request_id="r", deadline_s=wanted)).requests[0].deadline_s
        for wanted in (None, 5.0, 1e9)
    ]
    assert deadlines == [None, 5.0, 1e9]


def test_a_journal_replaces_prompt_and_seed(texts: TextModels) -> None:
    journal = Journal(prompt_ids=[1, 2, 3], seed=9, emitted=[[4]])
    ask = ready(texts, chat(seed=1), CallerContext(client="c", request_id="r", journal=journal)).requests[0]
    assert (ask.prompt_ids, ask.params.seed, ask.emitted) == ([1, 2, 3], 9, [[4]])
    again = ready(texts, completion(prompt=["a", "b"], echo=True), CallerContext(client="c", request_id="r", journal=journal))
    assert [request.prompt_ids for request in again.requests] == [[1, 2, 3]] and again.echoes == ()
    with pytest.raises(Rejected) as caught:
        ready(texts, chat(), CallerContext(client="c", request_id="r", journal=Journal(prompt_ids=[999], seed=0, emitted=[])))
    assert caught.value.param == "journal"


def test_long_prompts_go_through_the_pool(texts: TextModels) -> None:
    with pytest.raises(TooLong, match=f"{CONTEXT} tokens.*5000 tokens"):
        ready(texts, completion(prompt="x" * 5000))


def test_what_the_model_decides(texts: TextModels) -> None:
    with pytest.raises(NotFound):
        ready(texts, chat(model="other"))
    unseen = ScriptedDispatcher()
    unseen.model = lambda name: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(Unavailable):
        LOOP.run(Preprocessor(texts, unseen, AdmissionSpec(), SALTING).prepare(chat(), CALLER))


def prompt_of(texts: TextModels, **fields: Any) -> str:
    [request] = ready(texts, chat(**fields)).requests
    return texts.models[0].decode(request.prompt_ids, skip_special=False)


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *messages]}


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "video_url", "file", "image_embeds", "thing"])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_a_part_that_is_no_text_is_refused_by_its_name(kind: str, role: str) -> None:
    part = {"type": kind, kind: {"url": "data:,x"}}
    with pytest.raises(Rejected, match=f"a part of type '{kind}' is not taken, only text is") as caught:
        chat(**turns({"role": role, "content": [{"type": "text", "text": "a"}, part]}))
    assert caught.value.param == "messages[1].content[1].type"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role: must be 'assistant' or 'developer' or 'function' or"),
        ({"messages": [{"content": "x"}]}, "messages[0].role: this field is required"),
        ({"messages": "x"}, "messages: Expected `array`, got `str`"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type: must be 'function', got 'custom'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name: this field is required"),
        ({"tool_choice": "any"}, "tool_choice: must be 'auto' or 'none' or 'required', got 'any'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type: must be 'function', got 'allowed_tools'"),
        ({"response_format": {"type": "json"}}, "response_format.type: must be 'json_object' or 'json_schema' or"),
        ({"seed": 2**63}, "seed: must be at least -9223372036854775808 and at most 9223372036854775807, got 9223372036854775808"),
        (turns({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}),
         "messages[1].tool_calls[0].type: a call of type custom is not taken"),
        (turns({"role": "assistant", "tool_calls": [{"id": "1"}]}), "messages[1].tool_calls[0].function: a call has the name and"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_would_be_right(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Rejected) as caught:
        chat(**fields)
    assert caught.value.what.startswith(said) and caught.value.param == said.partition(":")[0] and "`$" not in caught.value.what


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guided_regex": "("}, "guided_regex: the pattern cannot be followed"),
        ({"guided_grammar": 'start: "a'}, "guided_grammar: the grammar cannot be followed"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs: the pattern cannot be followed"),
        ({"guided_json": {"type": "strng"}}, "guided_json: the schema cannot be followed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
         "response_format: the schema cannot be followed"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strng"}}}], "tool_choice": "required"},
         "tools: the schema cannot be followed"),
    ],
)  # fmt: skip
def test_a_grammar_that_does_not_compile_is_refused_by_its_field(texts: TextModels, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Rejected) as caught:
        ready(texts, chat(**fields))
    error = caught.value
    assert (error.code, error.param) == ("invalid_schema", said.partition(":")[0])
    assert error.what == said and error.why and "\n" not in error.why


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "refusal", "text": "x"}])
def test_a_part_without_its_text_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="has no text"):
        chat(**turns({"role": "user", "content": [part]}))


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "No."},
        {"content": None, "refusal": None, "tool_calls": [], "function_call": None},
        {"content": None, "function_call": {"name": "f", "arguments": ""}},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}]},
        {"content": [{"type": "refusal", "refusal": "No."}], "annotations": [], "audio": None},
        {"tool_calls": None},
    ],
)
def test_an_assistants_turn_as_apis_return_it_is_taken(texts: TextModels, answer: dict[str, Any]) -> None:
    assert prompt_of(texts, **turns({"role": "assistant", **answer}, {"role": "user", "content": "again"})).count("<|im_start|>user\n") == 2


def test_messages_and_tools_reach_the_template_as_they_were_sent() -> None:
    sent = {"role": "user", "sent": 1, "content": [{"type": "text", "text": "x", "cache_control": {}}], "own": [None]}
    tool = {"function": {"x": None, "name": "f"}, "type": "function", "sent": {}}
    found = chat(messages=[sent], tools=[tool])
    assert found.messages[0].sent == sent and found.tools is not None and json.dumps(found.tools[0].sent) == json.dumps(tool)


def test_the_last_message_is_continued(texts: TextModels) -> None:
    given = turns({"role": "assistant", "content": "The answer"})
    assert prompt_of(texts, **given).endswith("assistant\nThe answer<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_of(texts, **given, continue_final_message=True).endswith("assistant\nThe answer")
    assert prompt_of(texts, **given, continue_final_message=True, add_generation_prompt=False).endswith("assistant\nThe answer")
    assert prompt_of(texts, **given, continue_final_message=False).endswith("<|im_start|>assistant\n")
    with pytest.raises(Rejected, match="excludes add_generation_prompt") as caught:
        chat(**given, continue_final_message=True, add_generation_prompt=True)
    assert caught.value.param == "continue_final_message"
