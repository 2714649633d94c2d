"""The exact bytes of the router's answers, whole and streamed, at every generating path, and what each request asks of the replica.

A real router process and a replica that is told what to say. Only ids and times are masked; the framing of chunked bodies is left out. A
file holds the request, then the answer. ``submits.json``: what the replica was asked in each case. Record again:
``python -m tests.recorded.record answers``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.recorded.door import shown
from tests.recorded.recording import as_json, check, check_names, without
from tests.recorded.stage import Line, Stage
from tests.support.tiny_models import IM_END, SPECIALS

AREA = "answers"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GENERATE, EVENTS, INFER = (f"/v2/models/m/{verb}" for verb in ("generate", "generate_stream", "infer"))
STREAM: dict[str, Any] = {"stream": True}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
CONTINUOUS: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
#: Fields of a message that are new in every run.
NEW_EACH_TIME = ("boot", "stream", "request_id", "salt", "deadline_ms")

HELLO = (Line(("He", "llo", "!"), stop_id=IM_END),)
TWO = (Line(("a", "b", "c"), "length"), Line(("x", "y"), stop_id=IM_END))
CUT = (Line(("One.", " Tw", "o EN", "D and more"), ends=False),)
CALL = (Line(("Sure.", "<tool_", 'call>\n{"name": "weather", "argu', 'ments": {"city": "Rome"}}\n</tool_call>'), stop_id=IM_END),)
#: A character of three bytes, split between two steps, and one byte that is no character.
SPLIT = (Line(("\u20ac".encode()[:2], "\u20ac".encode()[2:] + b"!", b"\xff"), "length"),)


class Case(NamedTuple):
    path: str
    body: dict[str, Any]
    lines: tuple[Line, ...] = HELLO


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64, "seed": 1, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", "max_tokens": 64, "seed": 1, **fields}


def triton(**fields: Any) -> dict[str, Any]:
    return {"text_input": "hi", "max_tokens": 64, "seed": 1, **fields}


def tensor(name: str, datatype: str, *data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data), 1], "data": list(data)}


CASES = {
    "chat": Case(CHAT, chat()),
    "chat_stream": Case(CHAT, chat(**STREAM)),
    "chat_usage": Case(CHAT, chat(**USAGE)),
    "chat_usage_continuous": Case(CHAT, chat(**CONTINUOUS)),
    "chat_n2": Case(CHAT, chat(n=2), TWO),
    "chat_n2_stream": Case(CHAT, chat(n=2, **USAGE), TWO),
    "chat_logprobs": Case(CHAT, chat(logprobs=True, top_logprobs=2)),
    "chat_logprobs_stream": Case(CHAT, chat(logprobs=True, top_logprobs=2, **STREAM)),
    "chat_stop": Case(CHAT, chat(stop="END"), CUT),
    "chat_stop_stream": Case(CHAT, chat(stop=["END", "x"], **USAGE), CUT),
    "chat_stop_id": Case(CHAT, chat(stop_token_ids=[33]), (Line(("Hello",), stop_id=33),)),
    "chat_length": Case(CHAT, chat(max_tokens=5), (Line(("Hello",), "length"),)),
    "chat_split_stream": Case(CHAT, chat(**STREAM), SPLIT),
    "chat_sampling": Case(
        CHAT,
        chat(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1,
             logit_bias={"65": 2}, min_tokens=1, ignore_eos=True, seed=7),
    ),
    "chat_system": Case(CHAT, chat(messages=[{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}])),
    "chat_tools": Case(CHAT, chat(tools=[TOOL], max_tokens=128), CALL),
    "chat_tools_stream": Case(CHAT, chat(tools=[TOOL], max_tokens=128, **USAGE), CALL),
    "chat_tools_unused_stream": Case(CHAT, chat(tools=[TOOL], **STREAM)),
    "chat_tools_required": Case(CHAT, chat(tools=[TOOL], max_tokens=128, tool_choice="required"), CALL[:1]),
    "chat_tools_named": Case(CHAT, chat(tools=[TOOL], tool_choice=NAMED), (Line(('{"city": ', '"Rome"}'), stop_id=IM_END),)),
    "chat_tools_named_stream": Case(CHAT, chat(tools=[TOOL], tool_choice=NAMED, **STREAM), (Line(('{"city": ', '"Rome"}'),),)),
    "chat_json": Case(CHAT, chat(response_format={"type": "json_object"}), (Line(('{"a"', ": 1}"), stop_id=IM_END),)),
    "chat_schema": Case(CHAT, chat(guided_json={"type": "integer"}), (Line(("42",), stop_id=IM_END),)),
    "chat_fails": Case(CHAT, chat(), (Line(("He",), fails="engine_fault"),)),
    "chat_fails_stream": Case(CHAT, chat(**STREAM), (Line(("He", "llo"), fails="nan_logits"),)),
    "chat_fails_first_stream": Case(CHAT, chat(**STREAM), (Line((), fails="engine_fault"),)),
    "completions": Case(TEXT, text()),
    "completions_stream": Case(TEXT, text(**STREAM)),
    "completions_usage": Case(TEXT, text(**USAGE)),
    "completions_usage_continuous": Case(TEXT, text(**CONTINUOUS)),
    "completions_n2": Case(TEXT, text(n=2), TWO),
    "completions_n2_stream": Case(TEXT, text(n=2, **STREAM), TWO),
    "completions_logprobs": Case(TEXT, text(logprobs=2)),
    "completions_logprobs_stream": Case(TEXT, text(logprobs=2, **STREAM)),
    "completions_prompt_logprobs": Case(TEXT, text(prompt_logprobs=1)),
    "completions_stop": Case(TEXT, text(stop="END"), CUT),
    "completions_stop_shown": Case(TEXT, text(stop="END", include_stop_str_in_output=True), CUT),
    "completions_stop_stream": Case(TEXT, text(stop="END", **USAGE), CUT),
    "completions_echo": Case(TEXT, text(echo=True)),
    "completions_echo_stream": Case(TEXT, text(echo=True, **STREAM)),
    "completions_echo_logprobs_stream": Case(TEXT, text(echo=True, logprobs=1, **STREAM)),
    "completions_ids": Case(TEXT, text(prompt=[72, 105])),
    "completions_two_prompts": Case(TEXT, text(prompt=["hi", "ho"]), TWO),
    "completions_two_prompts_stream": Case(TEXT, text(prompt=["hi", "ho"], **USAGE), TWO),
    "completions_fails_stream": Case(TEXT, text(**STREAM), (Line(("He",), fails="engine_fault"),)),
    "generate": Case(GENERATE, triton()),
    "generate_logprobs": Case(GENERATE, triton(return_log_probs=True, exclude_input_in_output=False)),
    "generate_stream": Case(EVENTS, triton(stream=True)),
    "generate_stream_logprobs": Case(EVENTS, triton(stream=True, return_log_probs=True)),
    "generate_stream_one_event": Case(EVENTS, triton(stream=False)),
    "generate_stream_fails": Case(EVENTS, triton(stream=True), (Line(("He",), fails="engine_fault"),)),
    "generate_stop": Case(GENERATE, triton(stop_words=["END"]), CUT),
    "infer": Case(
        INFER,
        {"id": "one", "inputs": [tensor("text_input", "BYTES", "hi"), tensor("max_tokens", "INT32", 64), tensor("seed", "UINT64", 1)]},
    ),
    "infer_two_rows": Case(
        INFER,
        {"inputs": [tensor("text_input", "BYTES", "hi", "ho"), tensor("return_log_probs", "BOOL", True, True),
                    tensor("seed", "UINT64", 1, 1)],
         "outputs": [{"name": "text_output"}, {"name": "cum_log_probs"}, {"name": "output_log_probs"}]},
        TWO,
    ),
}  # fmt: skip
SUBMITS = "submits.json"
NAMES = [*(f"{name}.txt" for name in CASES), SUBMITS]


def readable(submit: dict[str, Any]) -> dict[str, Any]:
    """The prompt as text: in the tiny tokenizer a token is a byte."""
    ids = submit.pop("prompt_ids")
    prompt = "".join(chr(id) if id < 256 else SPECIALS[id - 256] for id in ids)
    return {**without(submit, NEW_EACH_TIME), "prompt": prompt}


def recordings() -> dict[str, str]:
    found: dict[str, str] = {}
    asked: dict[str, list[dict[str, Any]]] = {}
    with Stage() as stage:
        for name, case in CASES.items():
            answer, submits = stage.post(case.path, case.body, case.lines, name)
            found[f"{name}.txt"] = f"POST {case.path}\n{as_json(case.body)}\n{shown(answer, stage.places)}"
            asked[name] = [readable(submit) for submit in submits]
    return {**found, SUBMITS: as_json(asked)}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_every_recorded_answer_is_asked_for() -> None:
    check_names(AREA, NAMES)
