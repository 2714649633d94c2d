"""The table of fields in ``docs/api.md``, walked: each row is sent to a real HTTP API in front of a scripted dispatcher.

A field that is done must change what its row says, a refused one must be a 400 that names it, a harmless one must change nothing. The table
must have every field that the API knows, and no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from orchestrator.router.core.request import RouterRequest
from orchestrator.router.frontend.known_fields import HARMLESS, REFUSED
from orchestrator.router.frontend.schema import ChatBody, CompletionBody
from tests.support.scripted_router import Play, ServedDoor, tiny_texts
from tests.support.source_tree import ROOT
from tests.support.tiny_models import CHAT_TEMPLATE
from workers.protocol.messages import SamplingParams

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
BASE: dict[str, dict[str, Any]] = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "tiny", "prompt": "hi"},
}
TEMPLATE = (
    CHAT_TEMPLATE + "{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}{% if documents %}[{{ documents[0].text }}]{% endif %}"
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% if colour %}[{{ colour }}]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add"}}
GOES_ON = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Row(NamedTuple):
    field: str
    endpoints: tuple[str, ...]
    how: str
    meaning: str


class Seen(NamedTuple):
    """The result of a request: the answer (of a stream, its events), its headers, and the dispatcher's calls."""

    answer: Any
    headers: dict[str, str]
    request: RouterRequest

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt(self) -> bytes:
        return bytes(id for id in self.request.prompt_ids if id < 256)

    @property
    def choice(self) -> dict[str, Any]:
        return dict(self.answer["choices"][0])

    @property
    def text(self) -> str:
        return str(self.choice["text"] if "text" in self.choice else self.choice["message"]["content"])

    @property
    def guided(self) -> str:
        return self.params.guide.kind if self.params.guide is not None else ""


class Done(msgspec.Struct, frozen=True):
    """``ask``: the field alone. ``beside``: other fields of the request, with the field and without it. ``holds`` must be true with the
    field and false without it."""

    ask: Any
    holds: Callable[[Seen], bool]
    beside: dict[str, Any] = {}


def table() -> list[Row]:
    text = (ROOT / "docs" / "api.md").read_text()
    section = text[text.index("### Fields") : text.index("### Structured output")]
    rows = []
    for line in section.splitlines():
        if match := re.fullmatch(r"\| `(\w+)` \| (\w+) \| (\w+) \| (.*?) ?\|", line):
            where = tuple(PATHS) if match[2] == "both" else (match[2],)
            rows.append(Row(match[1], where, match[3], match[4]))
    return rows


TABLE = table()
DONE: dict[str, Done] = {
    "model": Done("tiny-alias", lambda seen: seen.answer["model"] == "tiny-alias"),
    "messages": Done([{"role": "function", "name": "f", "content": "42"}], lambda seen: b"tool\n42" in seen.prompt),
    "prompt": Done("ho", lambda seen: seen.prompt == b"ho"),
    "max_tokens": Done(3, lambda seen: seen.params.max_tokens == 3),
    "max_completion_tokens": Done(3, lambda seen: seen.params.max_tokens == 3),
    "min_tokens": Done(2, lambda seen: seen.params.min_tokens == 2),
    "ignore_eos": Done(True, lambda seen: seen.params.ignore_eos and not seen.params.stop_ids),
    "temperature": Done(0.5, lambda seen: seen.params.temperature == 0.5),
    "top_p": Done(0.5, lambda seen: seen.params.top_p == 0.5),
    "top_k": Done(5, lambda seen: seen.params.top_k == 5),
    "min_p": Done(0.5, lambda seen: seen.params.min_p == 0.5),
    "presence_penalty": Done(0.5, lambda seen: seen.params.presence_penalty == 0.5),
    "frequency_penalty": Done(0.5, lambda seen: seen.params.frequency_penalty == 0.5),
    "repetition_penalty": Done(1.5, lambda seen: seen.params.repetition_penalty == 1.5),
    "logit_bias": Done({"65": 1}, lambda seen: seen.params.logit_bias == {65: 1.0}),
    "allowed_token_ids": Done([66, 65, 66], lambda seen: seen.params.allowed_token_ids == (65, 66)),
    "bad_words": Done(["no"], lambda seen: seen.params.bad_words == (tuple(b"no"),)),
    "seed": Done(5, lambda seen: seen.params.seed == 5),
    "n": Done(2, lambda seen: len(seen.answer["choices"]) == 2),
    "stop": Done(["wor"], lambda seen: seen.text == "Hello, " and seen.choice["stop_reason"] == "wor"),
    "stop_token_ids": Done([65], lambda seen: 65 in seen.params.stop_ids),
    "include_stop_str_in_output": Done(True, lambda seen: seen.text == "Hello, wor", {"stop": ["wor"]}),
    "skip_special_tokens": Done(False, lambda seen: "<|im_end|>" in seen.text),
    "stream": Done(True, lambda seen: isinstance(seen.answer, list) and seen.answer[-1]["choices"][0]["finish_reason"] == "stop"),
    "stream_options": Done({"include_usage": True}, lambda seen: seen.answer[-1].get("usage") is not None, {"stream": True}),
    "logprobs": Done(True, lambda seen: bool(seen.choice["logprobs"])),
    "top_logprobs": Done(2, lambda seen: len(seen.choice["logprobs"]["content"][0]["top_logprobs"]) == 2, {"logprobs": True}),
    "prompt_logprobs": Done(1, lambda seen: len(seen.choice.get("prompt_logprobs", ())) == len(seen.request.prompt_ids)),
    "echo": Done(True, lambda seen: seen.text.startswith(("hi", "Well, "))),
    "return_token_ids": Done(
        True, lambda seen: seen.choice.get("token_ids") == [*b"Hello, world", 258]
        and seen.request.prompt_ids in (seen.answer.get("prompt_token_ids"), seen.choice.get("prompt_token_ids")),
    ),
    "return_tokens_as_token_ids": Done(True, lambda seen: "token_id:72" in json.dumps(seen.choice["logprobs"])),
    "truncate_prompt_tokens": Done(1, lambda seen: len(seen.request.prompt_ids) == 1),
    "add_special_tokens": Done(True, lambda seen: seen.request.prompt_ids[0] == 257),
    "response_format": Done({"type": "json_object", "schema": SCHEMA}, lambda seen: seen.guided == "json_schema"),
    "structured_outputs": Done({"regex": "a+"}, lambda seen: seen.guided == "regex"),
    "guided_json": Done(SCHEMA, lambda seen: seen.guided == "json_schema"),
    "guided_regex": Done("a+", lambda seen: seen.guided == "regex"),
    "guided_grammar": Done('start: "a"', lambda seen: seen.guided == "grammar"),
    "guided_choice": Done(["a", "b"], lambda seen: seen.guided == "choice"),
    "guided_whitespace_pattern": Done(
        "", lambda seen: seen.params.guide is not None and seen.params.guide.whitespace == "", {"guided_json": SCHEMA}
    ),
    "tools": Done([TOOL], lambda seen: b"[add]" in seen.prompt),
    "tool_choice": Done("required", lambda seen: seen.guided == "json_schema", {"tools": [TOOL]}),
    "parallel_tool_calls": Done(False, lambda seen: len(seen.choice["message"]["tool_calls"]) == 1, {"tools": [TOOL], "user": "calls"}),
    "functions": Done(
        [{"name": "add"}], lambda seen: b"[add]" in seen.prompt and seen.choice["message"].get("function_call", {}).get("name") == "add"
        and seen.choice["finish_reason"] == "function_call", {"user": "calls"},
    ),
    "function_call": Done({"name": "add"}, lambda seen: bool(seen.guided), {"functions": [{"name": "add"}]}),
    "reasoning_effort": Done("high", lambda seen: b"[high]" in seen.prompt),
    "add_generation_prompt": Done(False, lambda seen: b"assistant" not in seen.prompt),
    "continue_final_message": Done(True, lambda seen: seen.prompt.endswith(b"assistant\nWell, "), {"messages": GOES_ON}),
    "documents": Done([{"text": "book"}], lambda seen: b"[book]" in seen.prompt),
    "chat_template_kwargs": Done({"colour": "red"}, lambda seen: b"[red]" in seen.prompt),
    "cache_salt": Done("mine", lambda seen: seen.request.salt != unsalted()),
    "user": Done("me", lambda seen: seen.request.affinity == "me"),
    "prompt_cache_key": Done("key", lambda seen: seen.request.affinity == "key", {"user": "me"}),
    "metadata": Done({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, lambda seen: "a" * 32 in seen.request.marks),
    "request_id": Done("mine", lambda seen: seen.answer["id"].endswith("-mine")),
    "priority": Done(3, lambda seen: seen.request.priority == 3),
}  # fmt: skip
#: Where an endpoint has another form of a field, or another way to show what it does.
SPECIAL: dict[tuple[str, str], Done] = {
    ("completions", "logprobs"): Done(2, lambda seen: bool(seen.choice["logprobs"])),
    ("chat", "echo"): Done(True, DONE["echo"].holds, {"messages": GOES_ON, "continue_final_message": True}),
    ("chat", "return_tokens_as_token_ids"): Done(True, DONE["return_tokens_as_token_ids"].holds, {"logprobs": True}),
    ("completions", "return_tokens_as_token_ids"): Done(True, DONE["return_tokens_as_token_ids"].holds, {"logprobs": 1}),
    ("completions", "add_special_tokens"): Done(False, lambda seen: seen.prompt == b"hi"),
}
#: The tiny tokenizer adds nothing around a prompt, so there a completion's ``add_special_tokens`` shows elsewhere.
ELSEWHERE = {("completions", "add_special_tokens"), ("chat", "add_special_tokens")}
ASKS_FOR_IT: dict[str, Any] = {
    "best_of": 2, "structural_tag": "{}", "include_reasoning": False, "verbosity": "low", "chat_template": "{{ messages }}",
    "suffix": "end", "prompt_embeds": ["AAAA"], "use_beam_search": True, "logits_processors": ["x"], "modalities": ["text", "audio"],
    "audio": {"voice": "x", "format": "wav"}, "web_search_options": {}, "truncation_side": "right",
    "kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1},
}  # fmt: skip
HARMLESS_VALUES: dict[str, Any] = {
    "spaces_between_special_tokens": False, "guided_decoding_backend": "xgrammar", "length_penalty": 2.0, "early_stopping": True,
    "prediction": {"type": "content", "content": "x"}, "mm_processor_kwargs": {"a": 1}, "media_io_kwargs": {"a": 1},
    "prompt_cache_retention": "24h", "safety_identifier": "x", "service_tier": "flex", "store": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    folder = tmp_path_factory.mktemp("fields")
    with ServedDoor(folder, texts=tiny_texts(folder, TEMPLATE)) as door:
        door.dispatcher.script = play
        yield door


def play(request: RouterRequest, choice: int) -> Play:
    if request.affinity == "calls":
        return Play(text='<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>' * 2, burst=999)
    return Play(text=[*b"Hello, world", 258])


def send(door: ServedDoor, endpoint: str, fields: dict[str, Any]) -> Seen:
    response = door.http.post(PATHS[endpoint], json={**BASE[endpoint], **fields})
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line and line != "data: [DONE]"]
        answer: Any = [json.loads(line) for line in lines]
    else:
        answer = response.json()
    return Seen(answer, dict(response.headers), door.dispatcher.asks[-1])


def unsalted() -> str:
    return _UNSALTED[0]


_UNSALTED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _salt(door: ServedDoor) -> None:
    _UNSALTED.append(send(door, "chat", {}).request.salt)


def comparable(seen: Seen) -> tuple[Any, ...]:
    """What may not depend on a harmless field."""
    kept = {key: value for key, value in seen.answer.items() if key not in ("id", "created")}
    return kept, seen.request.prompt_ids, seen.params, seen.request.salt, seen.request.affinity, seen.request.n


def test_the_table_has_every_known_field_and_no_other() -> None:
    for endpoint, body in (("chat", ChatBody), ("completions", CompletionBody)):
        listed = [row.field for row in TABLE if endpoint in row.endpoints]
        assert len(listed) == len(set(listed)), "a field stands twice"
        assert set(listed) == {*body.__struct_fields__, *REFUSED, *HARMLESS}


def test_every_row_has_its_case() -> None:
    by_kind = {kind: {row.field for row in TABLE if row.how == kind} for kind in ("done", "refused", "harmless")}
    assert by_kind == {"done": {*DONE}, "refused": {*ASKS_FOR_IT}, "harmless": {*HARMLESS_VALUES}}


@pytest.mark.parametrize(
    ("endpoint", "field"), [(endpoint, row.field) for row in TABLE if row.how == "done" for endpoint in row.endpoints]
)  # fmt: skip
def test_what_is_done(door: ServedDoor, endpoint: str, field: str) -> None:
    if (endpoint, field) in ELSEWHERE:
        # Shown by test_what_a_tokenizer_adds_stays_and_counts: the tokenizer here adds nothing.
        assert send(door, endpoint, {field: True}).request.prompt_ids == send(door, endpoint, {}).request.prompt_ids
        return
    case = SPECIAL.get((endpoint, field), DONE[field])
    seed = {} if field == "seed" else {"seed": 1}
    with_it = send(door, endpoint, {**seed, **case.beside, field: case.ask})
    assert case.holds(with_it) and "x-trireme-ignored" not in with_it.headers
    assert not case.holds(send(door, endpoint, {**seed, **case.beside})), "it does the same without the field"


@pytest.mark.parametrize(
    ("endpoint", "field"), [(endpoint, row.field) for row in TABLE if row.how == "refused" for endpoint in row.endpoints]
)  # fmt: skip
def test_what_is_refused(door: ServedDoor, endpoint: str, field: str) -> None:
    response = door.http.post(PATHS[endpoint], json={**BASE[endpoint], field: ASKS_FOR_IT[field]})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field and error["message"].startswith(f"{field}: "), error
    (row,) = (row for row in TABLE if row.field == field)
    taken = [json.loads(value if value[:1] in '[{"tf0' else f'"{value}"') for value in re.findall(r"`([^`]+)`", row.meaning)]
    if field in REFUSED:
        assert taken == [*REFUSED[field].neutral], "the table names what is taken"
    for value in (None, *([1] if field == "best_of" else taken)):
        seen = send(door, endpoint, {"seed": 1, field: value})
        assert comparable(seen) == comparable(send(door, endpoint, {"seed": 1})) and "x-trireme-ignored" not in seen.headers


@pytest.mark.parametrize(
    ("endpoint", "field"), [(endpoint, row.field) for row in TABLE if row.how == "harmless" for endpoint in row.endpoints]
)  # fmt: skip
def test_what_is_harmless(door: ServedDoor, endpoint: str, field: str) -> None:
    seen = send(door, endpoint, {"seed": 1, field: HARMLESS_VALUES[field]})
    assert comparable(seen) == comparable(send(door, endpoint, {"seed": 1})) and "x-trireme-ignored" not in seen.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", PATHS)
def test_unknown_fields_are_named_in_a_header(door: ServedDoor, endpoint: str, stream: bool) -> None:
    inside = {"stream_options": {"include_usge": True}} if stream else {}
    fields = {"temprature": 0, "stream": stream, **inside, "response_format": {"type": "text", "shema": {}}}
    ignored = send(door, endpoint, fields).headers["x-trireme-ignored"].split(", ")
    assert ignored == ["temprature", *(["stream_options.include_usge"] if stream else []), "response_format.shema"]


def test_the_header_is_bounded_and_safe_and_errors_have_it_too(door: ServedDoor) -> None:
    odd = {"a\r\nset-cookie: b": 1, "\u00e9\U0001f600": 1, "x" * 5000: 1, **{f"field{index}": 1 for index in range(500)}}
    response = door.http.post(PATHS["chat"], json={**BASE["chat"], **odd})
    header = response.headers["x-trireme-ignored"]
    assert response.status_code == 200 and "set-cookie" not in response.headers
    assert header.startswith("a??set-cookie??b, ??, xxx") and header.endswith(" more)") and len(header) <= 1100 and header.isascii()
    refused = door.http.post(PATHS["chat"], json={"model": "tiny", "mesages": []})
    assert refused.status_code == 400 and refused.headers["x-trireme-ignored"] == "mesages"
    for path, body in (
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v2/models/tiny/generate", {"text_input": "hi"}),
    ):
        answer = door.http.post(path, json={"model": "tiny", **body, "temprature": 0})
        assert answer.status_code == 200 and answer.headers["x-trireme-ignored"].split(", ")[-1] == "temprature"
    tokenized = door.http.post("/tokenize", json={**BASE["chat"], "temprature": 0})
    assert tokenized.status_code == 200 and tokenized.headers["x-trireme-ignored"] == "temprature"


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        ("chat", {"tools": [TOOL], "functions": [{"name": "add"}]}, "functions"),
        ("chat", {"function_call": "auto"}, "function_call"),
        ("chat", {"functions": [{"name": "add"}], "function_call": {"name": "sub"}}, "function_call"),
        ("chat", {"functions": [{"nme": "add"}]}, "functions[0].name"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("completions", {"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens"),
        ("completions", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("completions", {"allowed_token_ids": [5000]}, "allowed_token_ids"),
        ("completions", {"bad_words": [" "]}, "bad_words"),
        ("completions", {"bad_words": ["x"] * 300}, "bad_words"),
        ("completions", {"request_id": "a b"}, "request_id"),
        ("chat", {"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ("chat", {"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ("chat", {"reasoning_effort": "huge"}, "reasoning_effort"),
        ("chat", {"use_beam_search": 0}, "use_beam_search"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(door: ServedDoor, endpoint: str, fields: dict[str, Any], param: str) -> None:
    response = door.http.post(PATHS[endpoint], json={**BASE[endpoint], **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_template_that_reads_no_effort_refuses_it(tmp_path: Path) -> None:
    with ServedDoor(tmp_path) as plain:
        response = plain.http.post(PATHS["chat"], json={**BASE["chat"], "reasoning_effort": "low"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "reasoning_effort"
