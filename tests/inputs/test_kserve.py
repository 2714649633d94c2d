"""KServe v2 and Triton's generate doors against a real router and gang: what is answered, what is refused and how, and that the same laws
hold as at the other doors.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from tests.inputs.table import DEEP
from tests.inputs.world import MAX_BODY, MODEL, VOCAB, World
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeOptions

GENERATE, STREAM, INFER = (f"/v2/models/{MODEL}/{verb}" for verb in ("generate", "generate_stream", "infer"))


class Row(NamedTuple):
    """``says``: words of the error."""

    path: str
    body: Any
    says: str
    status: int = 400


def ask(**fields: Any) -> dict[str, Any]:
    return {"text_input": "hi", "max_tokens": 2, **fields}


def tensor(name: str, datatype: str, *data: Any, shape: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [1, len(data)], "data": list(data), **more}


def infer(*tensors: dict[str, Any], text: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"inputs": [text or tensor("text_input", "BYTES", "hi"), *tensors], **fields}


BINARY = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 6}}

ROWS = [
    Row(GENERATE, b"", "no body"),
    Row(GENERATE, b"{", "not valid JSON"),
    Row(GENERATE, b"[]", "must be a JSON object"),
    Row(GENERATE, b'{"text_input":"\xff"}', "not valid UTF-8"),
    Row(GENERATE, b'{"text_input":"x","temperature":NaN}', "not valid JSON"),
    Row(GENERATE, b'{"text_input":"x","text_input":"y"}', "text_input: the key appears twice"),
    Row(GENERATE, b'{"a":' + DEEP + b"}", "nested too deeply"),
    Row(GENERATE, {}, "text_input"),
    Row(GENERATE, ask(text_input=""), "text_input: a prompt must not be empty"),
    Row(GENERATE, ask(text_input=7), "text_input"),
    Row(GENERATE, ask(text_input=["hi"]), "text_input"),
    Row(GENERATE, ask(text_input="x" * 2000), "maximum context length is 1024"),
    Row(GENERATE, ask(text_input="x" * 900_000), "maximum context length is 1024"),
    Row(GENERATE, ask(parameters=[]), "parameters"),
    Row(GENERATE, ask(parameters={"max_tokens": 3}), "max_tokens: given twice"),
    Row(GENERATE, ask(parameters={"text_input": "a"}), "text_input: belongs beside"),
    Row(GENERATE, ask(max_tokens="5"), "max_tokens: must be an integer"),
    Row(GENERATE, ask(max_tokens=1.5), "max_tokens: must be an integer"),
    Row(GENERATE, ask(max_tokens=True), "max_tokens: must be an integer"),
    Row(GENERATE, ask(max_tokens=0), "max_tokens: must be at least 1"),
    Row(GENERATE, ask(max_tokens=[2]), "max_tokens: must be an integer"),
    Row(GENERATE, ask(min_length=5), "min_length: 5 is more than max_tokens"),
    Row(GENERATE, ask(min_length=1, min_tokens=1), "min_tokens: says the same as min_length"),
    Row(GENERATE, ask(temperature=-1), "temperature: must be at least 0"),
    Row(GENERATE, ask(temperature="0"), "temperature: must be a number"),
    Row(GENERATE, ask(top_p=0), "top_p: must be above 0"),
    Row(GENERATE, ask(top_k=-5), "top_k: must be at least -1"),
    Row(GENERATE, ask(random_seed=2**64), "random_seed: must be at least"),
    Row(GENERATE, ask(seed=1, random_seed=1), "seed: says the same as random_seed"),
    Row(GENERATE, ask(stop_words=["x"] * 100), "stop_words: 100 stop strings are more than 16"),
    Row(GENERATE, ask(stop_words=["x" * 300]), "stop_words: a stop string has 1 to 256"),
    Row(GENERATE, ask(stop_words=[3]), "stop_words: must be a text or a list"),
    Row(GENERATE, ask(lora_task_id=7), "lora_task_id: not offered"),
    Row(GENERATE, ask(end_id=VOCAB), "token ids must be between 0"),
    Row(GENERATE, ask(beam_width=2), "beam_width: answers come one a prompt"),
    Row(GENERATE, ask(return_context_logits=True), "return_context_logits: not offered"),
    Row(GENERATE, ask(image_input=[1]), "image_input: not offered"),
    Row(GENERATE, ask(lora_task_id=3), "lora_task_id: not offered"),
    Row(GENERATE, ask(stream=True), "stream: generate answers once"),
    Row(GENERATE, ask(stream="yes"), "stream: must be true or false"),
    Row(GENERATE, ask(id="a\nb"), "id: an id has at most"),
    Row(GENERATE, ask(guided_decoding_guide_type="regex"), "guided_decoding_guide_type"),
    Row(GENERATE, ask(guided_decoding_guide_type="regex", guided_decoding_guide="("), "guided_decoding_guide"),
    Row(GENERATE, ask(guided_decoding_guide_type="json_schema", guided_decoding_guide="{"), "guided_decoding_guide"),
    Row(STREAM, ask(max_tokens=0), "max_tokens: must be at least 1"),
    Row(STREAM, b"{", "not valid JSON"),
    Row(INFER, {}, "inputs"),
    Row(INFER, {"inputs": []}, "text_input: the tensor is missing"),
    Row(INFER, {"inputs": [BINARY]}, "binary tensors are not taken"),
    Row(INFER, infer(tensor("text_input", "BYTES", "a")), "two tensors have the same name"),
    Row(INFER, infer(text=tensor("text_input", "INT32", 5)), "text_input: is a tensor of BYTES, got 'INT32'"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", 5)), "text_input: holds data that is not BYTES"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", "a", shape=[2, 1])), "the shape says 2 elements, the data has 1"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", "a", shape=[-1, -1])), "none of them negative"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", "a", shape=[10**300, 10**300])), "the shape says"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", shape=[0, 1])), "a batch has 1 to 128 prompts, got 0"),
    Row(INFER, infer(text=tensor("text_input", "BYTES", *["a"] * 129)), "a batch has 1 to 128 prompts, got 129"),
    Row(INFER, infer(tensor("max_tokens", "INT32", 2, 3)), "max_tokens: takes one value for the whole batch"),
    Row(INFER, infer(tensor("max_tokens", "INT32", [[[[2]]]], shape=[1, 1])), "max_tokens: holds data that is not INT32"),
    Row(INFER, infer(tensor("temperature", "FP32", "hot")), "temperature: holds data that is not FP32"),
    Row(INFER, infer(tensor("stream", "BOOL", True)), "stream: infer answers once"),
    Row(INFER, infer(tensor("lora_task_id", "UINT64", 7)), "lora_task_id: not offered"),
    Row(INFER, infer(outputs=[{"name": "logits"}]), "no output is named 'logits'"),
    Row(INFER, infer(*[tensor(f"t{index}", "INT32", 1) for index in range(100)]), "more than 64"),
    Row("/v2/models/ghost/generate", ask(), "does not exist", 404),
    Row("/v2/models/..%2f..%2fetc%2fpasswd/infer", infer(), "does not exist", 404),
    Row(f"/v2/models/{MODEL}/versions/2/generate", ask(), "no version 2", 404),
    Row(f"/v2/models/{MODEL}/nothing", ask(), "does not take POST: it takes", 405),
    Row("/v2/nothing", ask(), "there is no path /v2/nothing", 404),
]  # fmt: skip


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text[:300]
    body = response.json()
    assert set(body) == {"error"} and len(body["error"]) < 700 and body["error"].isprintable()
    assert response.headers["x-request-id"]
    return str(body["error"])


def oracle(prompt: str, count: int, seed: int = 1) -> str:
    return bytes(expected_tokens(list(prompt.encode()), SamplingParams(seed=seed, temperature=0.0, max_tokens=count))).decode()


GREEDY = {"temperature": 0, "random_seed": 1, "ignore_eos": True}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_body_that_cannot_be(world: World, row: Row) -> None:
    accepted = world.status()["counts"]["accepted"]
    content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    assert row.says in refused(world.post(row.path, content=content), row.status)
    assert world.status()["counts"]["accepted"] == accepted
    world.good_http()


def test_generate(world: World) -> None:
    answer = world.post(GENERATE, {"text_input": "abc", "max_tokens": 6, **GREEDY, "bad_words": "", "stop_words": ""})
    assert answer.json() == {"model_name": MODEL, "model_version": "1", "text_output": oracle("abc", 6)}
    whole = world.post(
        GENERATE, {"text_input": "abc", "id": "x1", "parameters": {"max_tokens": 6, "exclude_input_in_output": False, **GREEDY}}
    )
    assert whole.json()["text_output"] == "abc" + oracle("abc", 6) and whole.json()["id"] == "x1"
    cut = oracle("abc", 6)[3]
    stopped = world.post(GENERATE, {"text_input": "abc", "max_tokens": 6, "stop_words": [cut], **GREEDY})
    assert stopped.json()["text_output"] == oracle("abc", 6).split(cut)[0]


def test_generate_stream(world: World) -> None:
    body = {"text_input": "abc", "max_tokens": 300, **GREEDY}
    answer = world.post(STREAM, body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert "".join(event["text_output"] for event in events) == oracle("abc", 300) and len(events) > 1
    assert all(set(event) == {"model_name", "model_version", "text_output"} for event in events)
    once = world.post(STREAM, {**body, "stream": False})
    assert json.loads(once.text.removeprefix("data: "))["text_output"] == oracle("abc", 300)


def test_infer_of_a_batch(world: World) -> None:
    texts = tensor("text_input", "BYTES", ["abc"], ["xyz"], shape=[2, 1])
    parts = [tensor("max_tokens", "INT32", 5, 5, shape=[2, 1]), tensor("temperature", "FP32", 0.0), tensor("seed", "UINT64", 1)]
    answer = world.post(INFER, infer(*parts, tensor("ignore_eos", "BOOL", True), text=texts, id="7", outputs=[{"name": "text_output"}]))
    outputs = [{"name": "text_output", "datatype": "BYTES", "shape": [2, 1], "data": [oracle("abc", 5), oracle("xyz", 5)]}]
    assert answer.json() == {"model_name": MODEL, "model_version": "1", "id": "7", "outputs": outputs}


def test_what_the_server_says_of_itself(world: World) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready", f"/v2/models/{MODEL}/versions/1/ready"):
        assert world.http.get(path).status_code == 200
    metadata, config = (world.http.get(f"/v2/models/{MODEL}{end}").json() for end in ("", "/config"))
    assert metadata["versions"] == ["1"] and metadata["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": [-1, 1]}
    assert [row["name"] for row in metadata["inputs"]] == [row["name"] for row in config["input"]]
    assert config["output"][0] == {"name": "text_output", "data_type": "TYPE_STRING", "dims": [1]}


def test_unknown_names_are_counted_and_ignored(world: World) -> None:
    def ignored() -> float:
        series = [line for line in world.http.get("/metrics").text.splitlines() if line.startswith("trireme_router_ignored_fields_total ")]
        return float(series[0].split()[1])

    before = ignored()
    assert world.post(GENERATE, ask(flux=1, parameters={"mood": "good", "priority": 3})).status_code == 200
    assert world.post(INFER, infer(tensor("flux", "INT32", 1), parameters={"binary_data_output": True})).status_code == 200
    assert ignored() == before + 3


def test_programs_need_no_type_and_pages_do(world: World) -> None:
    content = json.dumps(ask()).encode()
    for kind in ("application/x-www-form-urlencoded", "application/octet-stream", "text/plain"):
        assert world.post(GENERATE, content=content, headers={"content-type": kind}).status_code == 200
        for page in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
            refused(world.post(GENERATE, content=content, headers={"content-type": kind, **page}), 415)
    refused(world.post(GENERATE, content=b" " * (MAX_BODY + 1)), 413)
    assert "binary" in refused(world.post(INFER, content=b"{}xx", headers={"inference-header-content-length": "2"}), 400)


def test_a_reader_that_leaves_frees_its_sequence(world: World) -> None:
    before = world.status()["counts"]["cancelled"]
    with world.http.stream("POST", STREAM, json={"text_input": "abc", "max_tokens": 900, **GREEDY}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: world.status()["counts"]["cancelled"] == before + 1, what="the cancelled row")
    world.idle()


def test_a_dead_gang_is_a_pause() -> None:
    slow = msgspec.structs.replace(FAKE, options=FakeOptions(fake_step_ms=5.0))
    with short_folder() as folder, RouterRun(folder, http=True) as router, contextlib.ExitStack() as stack:
        url = router.wait_serving().http
        gangs = {
            name: stack.enter_context(
                Gang(folder, [router.spec.back], name=name, tp=1, engine=slow, artifact=router.spec.models[0].tokenizer)
            )
            for name in ("a", "b")
        }

        def busy() -> list[str]:
            return [row["name"] for row in httpx.get(url + "/status", trust_env=False).json()["replicas"] if row["choices"]]

        wait_for(lambda: len(httpx.get(url + "/status", trust_env=False).json()["replicas"]) == 2, what="both gangs")
        body = {"text_input": "abc", "max_tokens": 400, **GREEDY}
        with httpx.stream("POST", url + STREAM, json=body, trust_env=False, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            events = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
            (serving,) = busy()
            os.kill(gangs[serving].pid(0), signal.SIGKILL)
            events += [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(event["text_output"] for event in events) == oracle("abc", 400)


def test_keys_and_tenants(world: World) -> None:
    def keyed(path: str, key: str = "", body: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.request(
            "GET" if body is None else "POST", world.keyed_url + path, headers=headers, json=body, trust_env=False, timeout=30
        )

    for path in ("/v2/health/live", "/v2/health/ready"):
        assert keyed(path).status_code == 200, "probes are open"
    strangers = [keyed("/v2"), keyed("/v2/nothing"), keyed(f"/v2/models/{MODEL}"), keyed(GENERATE, "wrong", ask())]
    assert {(answer.status_code, answer.text) for answer in strangers} == {(401, strangers[0].text)}
    assert "API key" in refused(strangers[0], 401)
    assert keyed(GENERATE, world.api_key, ask()).status_code == 200
    for path, body in ((GENERATE, ask()), (INFER, infer()), (f"/v2/models/{MODEL}/config", None), (f"/v2/models/{MODEL}/ready", None)):
        assert "does not exist" in refused(keyed(path, world.other_api_key, body), 404)
