"""The table of bodies that no router may take, by the number of their row: HTTP and RPC are both checked against it, word for word.

Facts only. A body of bytes is sent as it is, any other as JSON.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.inputs.world import CHAT, CONTEXT, TEXT, VOCAB, chat, text

SCHEMA, LONG = "invalid_schema", "context_length_exceeded"
HELLO = [{"role": "user", "content": "hi"}]


class Row(NamedTuple):
    """``param`` None: the error names no field."""

    number: int
    path: str
    body: Any
    param: str | None = None
    code: str = "invalid_request"

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def schema(body: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": body}})


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def image(url: str) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


DEEP = b'{"items":' * 5000 + b"{}" + b"}" * 5000
#: A number that JSON may hold and no 64-bit integer.
HUGE = 10**300

BODIES = [
    Row(1, CHAT, b""),
    Row(2, CHAT, b"{"),
    Row(3, CHAT, b"[]"),
    Row(4, CHAT, b'"x"'),
    Row(5, CHAT, b'{"model":"\xff"}'),
    Row(5, CHAT, b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}'),
    Row(6, CHAT, b'{"model":"m","prompt":"x","temperature":NaN}'),
    Row(6, TEXT, b'{"model":"m","prompt":"x","temperature":1e999}', "temperature"),
    Row(7, TEXT, b'{"model":"m","prompt":"x","seed":' + b"1" * 5000 + b"}"),
    Row(7, TEXT, b'{"model":"m","prompt":"x","seed":' + b"1" * 4000 + b"}", "seed"),
    Row(8, CHAT, b"null"),
    Row(9, CHAT, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    Row(9, CHAT, b'{"a":' + b"[" * 400 + b"]" * 400 + b"}"),
    Row(9, CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    Row(10, CHAT, json.dumps({f"k{i}": 0 for i in range(100_000)}).encode()),
    Row(11, CHAT, b'{"model":"m","messages":[{"role":"user","content":"a"}],"max_tokens":1,"max_tokens":2}', "max_tokens"),
    Row(11, CHAT, b'{"model":"m","messages":[{"role":"user","role":"system","content":"a"}]}', "role"),
]

NAMES = [
    Row(17, CHAT, {"messages": HELLO}, "model"),
    Row(17, CHAT, chat(model="ghost"), "model", "model_not_found"),
    Row(17, CHAT, chat(model="../../etc/passwd"), "model", "model_not_found"),
    Row(17, CHAT, chat(model="/dev/zero"), "model", "model_not_found"),
    Row(17, CHAT, chat(model="http://127.0.0.1:1/model"), "model", "model_not_found"),
    Row(17, CHAT, chat(model="x" * 10_000), "model"),
    Row(17, CHAT, chat(model="a\0b"), "model"),
    Row(17, CHAT, chat(model="a\r\nb"), "model"),
    Row(17, CHAT, chat(model="\x1b[31m"), "model"),
    Row(17, CHAT, chat(model="\u202eevil"), "model"),
    Row(17, CHAT, chat(model=7), "model"),
    Row(17, CHAT, chat(model=None), "model"),
]

FIELDS = [
    Row(18, CHAT, {"model": "m"}, "messages"),
    Row(18, CHAT, chat(messages=[]), "messages"),
    Row(18, CHAT, chat(messages="hi"), "messages"),
    Row(19, CHAT, chat(messages=HELLO * 10_001), "messages"),
    Row(20, CHAT, chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role"),
    Row(21, CHAT, chat(messages=[{"role": "user", "content": None}]), "messages[0].content"),
    Row(21, CHAT, chat(messages=[{"role": "user"}]), "messages[0].content"),
    Row(22, CHAT, chat(messages=[{"role": "user", "content": [{"type": "video"}]}]), "messages[0].content[0].type"),
    Row(22, CHAT, image("http://127.0.0.1:1/"), "messages[0].content[0].type"),
    Row(23, TEXT, text(prompt=""), "prompt"),
    Row(23, TEXT, text(prompt=[]), "prompt"),
    Row(23, TEXT, text(prompt=[[]]), "prompt"),
    Row(23, TEXT, text(prompt=["a", 1]), "prompt"),
    Row(23, TEXT, text(prompt=[1, "a"]), "prompt"),
    Row(23, TEXT, text(prompt=None), "prompt"),
    Row(23, TEXT, text(prompt={"a": 1}), "prompt"),
    Row(24, TEXT, text(prompt=["a"] * 129), "prompt"),
    Row(24, TEXT, text(prompt=["a"] * 100, n=8), "prompt"),
    Row(25, TEXT, text(prompt=[-1]), "prompt"),
    Row(25, TEXT, text(prompt=[VOCAB]), "prompt"),
    Row(25, TEXT, text(prompt=[2**63]), "prompt"),
    Row(25, TEXT, text(prompt=[HUGE]), "prompt"),
    Row(25, TEXT, text(prompt=[True]), "prompt"),
    Row(26, TEXT, text(prompt="x" * 2000), "prompt", LONG),
    Row(26, TEXT, text(prompt="x" * 900_000), "prompt", LONG),
    Row(26, CHAT, chat(messages=[{"role": "user", "content": "x" * 900_000}]), "messages", LONG),
    Row(27, TEXT, text(max_tokens=CONTEXT - 1), "prompt", LONG),
    Row(27, CHAT, chat(max_tokens=CONTEXT), "messages", LONG),
    Row(28, CHAT, chat(max_tokens=0), "max_tokens"),
    Row(28, CHAT, chat(max_tokens=-1), "max_tokens"),
    Row(28, CHAT, chat(max_completion_tokens=0), "max_completion_tokens"),
    Row(28, CHAT, chat(max_tokens=10**12), "max_tokens"),
    Row(28, CHAT, chat(max_tokens=HUGE), "max_tokens"),
    Row(29, CHAT, chat(max_tokens="5"), "max_tokens"),
    Row(30, CHAT, chat(max_tokens=1.5), "max_tokens"),
    Row(30, CHAT, chat(max_tokens=True), "max_tokens"),
    Row(30, CHAT, chat(min_tokens=5, max_tokens=4), "min_tokens"),
    Row(31, CHAT, chat(n=0), "n"),
    Row(31, CHAT, chat(n=9), "n"),
    Row(31, CHAT, chat(n=10**6), "n"),
    Row(32, TEXT, text(n=2, best_of=1), "best_of"),
    Row(32, TEXT, text(best_of=2, stream=True), "best_of"),
    Row(32, CHAT, chat(stream="yes"), "stream"),
    Row(32, CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    Row(33, CHAT, chat(temperature=-1), "temperature"),
    Row(33, CHAT, chat(temperature=1e9), "temperature"),
    Row(33, CHAT, chat(temperature=HUGE), "temperature"),
    Row(33, CHAT, chat(temperature="hot"), "temperature"),
    Row(34, CHAT, chat(top_p=0), "top_p"),
    Row(34, CHAT, chat(top_p=1.1), "top_p"),
    Row(34, CHAT, chat(min_p=-0.1), "min_p"),
    Row(35, CHAT, chat(presence_penalty=2.1), "presence_penalty"),
    Row(35, CHAT, chat(frequency_penalty=-2.1), "frequency_penalty"),
    Row(35, CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    Row(36, CHAT, chat(top_k=-5), "top_k"),
    Row(37, CHAT, chat(seed=2**64), "seed"),
    Row(38, CHAT, chat(stop=["x"] * 1000), "stop"),
    Row(38, CHAT, chat(stop=""), "stop"),
    Row(39, CHAT, chat(stop="x" * 500_000), "stop"),
    Row(39, CHAT, chat(stop=[3]), "stop[0]"),
    Row(39, CHAT, chat(stop_token_ids=[VOCAB]), "stop_token_ids"),
    Row(40, CHAT, chat(logit_bias={str(i): 0 for i in range(60_000)})),
    Row(40, CHAT, chat(logit_bias={"abc": 1}), "logit_bias"),
    Row(40, CHAT, chat(logit_bias={str(VOCAB): 1}), "logit_bias"),
    Row(41, CHAT, chat(logit_bias={"1": 1e9}), "logit_bias"),
    Row(41, CHAT, chat(logit_bias={"1": HUGE}), "logit_bias"),
    Row(41, CHAT, chat(logit_bias={"1": None}), "logit_bias[...]"),
    Row(42, CHAT, chat(logprobs=True, top_logprobs=10**6), "top_logprobs"),
    Row(42, CHAT, chat(top_logprobs=2), "top_logprobs"),
    Row(42, TEXT, text(logprobs=21), "logprobs"),
    Row(42, TEXT, text(logprobs=-1), "logprobs"),
    Row(42, TEXT, text(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    Row(44, CHAT, schema({"$ref": "#"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"$ref": "http://127.0.0.1:1/schema.json"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"$ref": "file:///etc/passwd"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"$ref": "#/$defs/none"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"pattern": "(a+)+$"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"pattern": "((a{1,100}){1,100}){1,100}"}), "response_format", SCHEMA),
    Row(44, CHAT, schema({"type": "king"}), "response_format", SCHEMA),
    Row(44, CHAT, b'{"model":"m","messages":[],"response_format":{"type":"json_schema","json_schema":{"schema":' + DEEP + b"}}}",
        None, SCHEMA),
    Row(44, CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    Row(45, CHAT, chat(guided_regex="a", guided_choice=["b"]), "response_format"),
    Row(45, CHAT, chat(guided_choice=[]), "guided_choice", SCHEMA),
    Row(45, CHAT, chat(guided_json="{"), "guided_json", SCHEMA),
    Row(45, CHAT, chat(guided_regex="("), "guided_regex", SCHEMA),
    Row(45, CHAT, chat(guided_grammar="start: missing"), "guided_grammar", SCHEMA),
    Row(45, CHAT, chat(structured_outputs={"regex": ""}), "structured_outputs.regex", SCHEMA),
    Row(46, CHAT, chat(tools=[tool(f"t{i}") for i in range(10_000)]), "tools"),
    Row(46, CHAT, chat(tools=[tool("a"), tool("a")]), "tools"),
    Row(46, CHAT, chat(tools=[tool("a")], tool_choice=tool("b")), "tool_choice"),
    Row(46, CHAT, chat(tool_choice="required"), "tool_choice"),
    Row(46, CHAT, chat(tool_choice="maybe"), "tool_choice"),
    Row(47, CHAT, chat(chat_template="{{ 1 }}"), "chat_template"),
    Row(47, CHAT, chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs"),
    Row(47, CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    Row(47, CHAT, chat(chat_template_kwargs={"a": HUGE}), "messages"),
    Row(49, CHAT, chat(user="x" * 500_000), "user"),
    Row(49, CHAT, chat(metadata={"a": "x" * 500_000}), "metadata"),
    Row(49, CHAT, chat(cache_salt=""), "cache_salt"),
    Row(49, CHAT, chat(cache_salt="x" * 10_000), "cache_salt"),
    Row(49, CHAT, chat(cache_salt="a\nb"), "cache_salt"),
]  # fmt: skip

ROWS = [*BODIES, *NAMES, *FIELDS]
IDS = [f"{row.number}-{index}" for index, row in enumerate(ROWS)]
