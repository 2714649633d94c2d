"""Mutated requests by the thousand, from a fixed seed: nothing dies, nothing is a fault of ours, and others are served all the while."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from orchestrator.config.router_spec import AdmissionSpec
from tests.inputs.mutate import WIRE_EDGES, Mutator
from tests.inputs.world import CHAT, TEXT, Health, World, chat, growth, text
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from workers.protocol import messages
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Capacity,
    Credit,
    Done,
    Failed,
    Generate,
    Heartbeat,
    Hello,
    Journal,
    Query,
    Submit,
    Tokens,
    Usage,
)
from workers.protocol.status import EngineStats

SEED = 20261122
pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
#: Frames between two questions that must be answered.
BATCH = 100
long = pytest.mark.long

GUIDED = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {}}}}}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (TEXT, text(prompt=[1, 2, 3], max_tokens=1, seed=5, stop=["ab", "c"], logit_bias={"65": 1.5}, user="u", cache_salt="s")),
    (TEXT, text(prompt="hello", max_tokens=2, n=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, logprobs=2, echo=True)),
    (TEXT, text(prompt=["a", "b"], max_tokens=1, stream=True, stream_options={"include_usage": True}, stop_token_ids=[65, 66])),
    (TEXT, text(prompt=[[1, 2], [3]], max_tokens=1, prompt_logprobs=1, min_tokens=1, ignore_eos=True, best_of=1)),
    (CHAT, chat(max_tokens=1, logprobs=True, top_logprobs=3, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1)),
    (CHAT, chat(max_tokens=2, metadata={"a": [1, {"b": None}]}, chat_template_kwargs={"enable_thinking": False}, stream=True)),
    (CHAT, chat(max_tokens=1, tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])),
    (CHAT, {**chat(max_tokens=1), "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "é"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]}),
]  # fmt: skip
TENSORS = {"id": "1", "outputs": [{"name": "text_output"}], "inputs": [
    {"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]]},
    {"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [1]},
    {"name": "return_log_probs", "shape": [2, 1], "datatype": "BOOL", "data": [True, True]},
]}  # fmt: skip
RARE: list[tuple[str, dict[str, Any]]] = [(CHAT, chat(max_tokens=2, **GUIDED)), (TEXT, text(max_tokens=2, guided_regex="[a-z]{2}"))]


def a_body(mutator: Mutator) -> tuple[str, dict[str, Any]]:
    path, body = mutator.random.choice(RARE if mutator.random.random() < 0.02 else BODIES)
    return path, json.loads(json.dumps(body))


def a_frame(mutator: Mutator, boot: str) -> bytes:
    """One mutated message of a client."""
    pick = mutator.random
    path, body = a_body(mutator)
    stream, request = pick.randrange(64), f"q{pick.randrange(200)}"
    kind = pick.randrange(8)
    message: messages.Message
    if kind == 0:
        message = Cancel(boot=boot, stream=stream)
    elif kind == 1:
        message = Credit(boot=boot, streams=[stream, stream + 1], tokens=[5, 7])
    elif kind == 2:
        message = Query(boot=boot, stream=stream, what=pick.choice(("status", "models", "metrics")))
    else:
        journal = Journal(prompt_ids=[1, 2, 3], seed=5, emitted=[[65, 66]]) if kind == 3 else None
        message = Generate(
            boot=boot, stream=stream, request_id=request, endpoint="chat" if path == CHAT else "completions",
            body=json.dumps(body).encode(), attempt=pick.randrange(3), journal=journal,
            credit=pick.choice((1, 16, messages.UNLIMITED)), deadline_ms=2000, texts=pick.random() < 0.5,
        )  # fmt: skip
    return _spoilt(mutator, message, body)


def _spoilt(mutator: Mutator, message: messages.Message, body: dict[str, Any] | None = None) -> bytes:
    """A message with a byte, a field, or something in its body wrong."""
    frame = messages.encode(message)
    kind = mutator.random.random()
    if kind < 0.2:
        return mutator.bytes(frame)
    fields = unpack(frame)
    try:
        if kind < 0.4 or body is None or "body" not in fields:
            return pack(mutator.tree(fields, WIRE_EDGES))
        spoilt = json.dumps(mutator.tree(body)).encode()
        fields["body"] = mutator.bytes(spoilt) if kind > 0.85 else spoilt
        return pack(fields)
    except (OverflowError, TypeError, UnicodeEncodeError):  # it cannot even be written
        return mutator.bytes(frame)


@pytest.mark.parametrize("count", [6_000, pytest.param(200_000, marks=long)])
def test_mutated_frames_of_clients(world: World, count: int) -> None:
    mutator = Mutator(SEED)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(4)]
    slowest, answers = 0.0, Counter[str]()
    for socket in sockets:
        socket.linger, socket.sndhwm, socket.rcvhwm = 0, 100_000, 100_000
        socket.connect(world.open.spec.rpc)
    try:
        with Health(world.url) as health, growth(world.open.process.pid) as grown:
            for batch in range(count // BATCH):
                socket = sockets[batch % len(sockets)]
                for _ in range(BATCH):
                    socket.send(a_frame(mutator, f"boot{batch % len(sockets)}"))
                slowest = max(slowest, _barrier(socket, batch, answers))
                if batch % 100 == 99:
                    world.good_http()
            _until_done(sockets, count // 200, answers)
            socket_kinds = dict(answers)
            for socket in sockets:
                socket.close(0)
            world.idle()
    finally:
        context.destroy(0)
    world.alive()
    world.good_http()
    assert socket_kinds.get("internal_error", 0) + socket_kinds.get("engine_fault", 0) == 0, answers
    assert socket_kinds["malformed"] > count / 20 and socket_kinds["invalid_request"] > count / 50 and socket_kinds["done"] > count / 200, (
        answers
    )
    assert "failed at the door" not in world.open.log.read_text()
    figure(f"{count} mutated frames: slowest answer after {BATCH} of them", slowest, 5.0)
    figure(f"{count} mutated frames: /health p99", health.p99() * 1000, 100.0, "ms")
    figure(f"{count} mutated frames: memory of the router", max(0.0, grown[0]), 50.0, "MB")


def _barrier(socket: zmq.Socket[bytes], number: int, answers: Counter[str]) -> float:
    """Read until a question asked now is answered; counts what came by kind. Returns the seconds that it took."""
    started = time.monotonic()
    stream = 10**6 + number
    socket.send(messages.encode(Query(boot="barrier", stream=stream, what="models")))
    while True:
        message = _answer(socket, answers)
        if isinstance(message, messages.Report) and message.stream == stream:
            return time.monotonic() - started


def _answer(socket: zmq.Socket[bytes], answers: Counter[str]) -> messages.ToClient:
    assert socket.poll(30_000), "the router does not answer any more"
    message = messages.decode_to_client(socket.recv())
    answers[message.code if isinstance(message, Failed) else type(message).__name__.lower()] += 1
    return message


def _until_done(sockets: list[zmq.Socket[bytes]], least: int, answers: Counter[str]) -> None:
    """Read on until more than ``least`` requests are done: on a busy machine they take longer than to be asked for."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    deadline = time.monotonic() + 60
    while answers["done"] <= least:
        ready = poller.poll(1000)
        for socket, _ in ready:
            _answer(socket, answers)
        assert time.monotonic() < deadline, f"too few requests are done: {answers}"


# --- HTTP


def a_request(mutator: Mutator) -> bytes:
    """One mutated HTTP request; what is whole asks the server to close."""
    pick = mutator.random
    path, body = a_body(mutator)
    kind = pick.random()
    if kind < 0.5:
        content = json.dumps(mutator.tree(body)).encode()
    elif kind < 0.7:
        content = mutator.bytes(json.dumps(body).encode())
    else:
        content = json.dumps(body).encode()
    if pick.random() < 0.2:
        asked = {"text_input": "a", "max_tokens": 2, "stop_words": ["b"], "parameters": {"temperature": 0.5, "random_seed": 3}}
        path, content = pick.choice((
            ("/v2/models/m/generate", json.dumps(mutator.tree(asked)).encode()),
            ("/v2/models/m/generate_stream", json.dumps(mutator.tree(asked)).encode()),
            ("/v2/models/m/infer", json.dumps(mutator.tree(TENSORS)).encode()),
            ("/tokenize", json.dumps(mutator.tree({"model": "m", "prompt": "hello"})).encode()),
            ("/detokenize", json.dumps(mutator.tree({"model": "m", "tokens": [65, 66]})).encode()),
            ("/v1/models/m", b""), ("/status", b""), ("/metrics", b""), ("/ready", b""),
        ))  # fmt: skip
    lines = [f"{'POST' if content else 'GET'} {path} HTTP/1.1", "host: x", "connection: close", "x-request-id: r-1"]
    if content:
        lines.append("content-type: application/json")
    if content and pick.random() < 0.1:
        lines.append("transfer-encoding: chunked")
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    elif content:
        lines.append(f"content-length: {len(content)}")
    if pick.random() < 0.05:
        lines.append("expect: 100-continue")
    request = "\r\n".join([*lines, "", ""]).encode() + content
    return mutator.bytes(request) if kind >= 0.7 else request


_STATUS = re.compile(rb"HTTP/1\.1 (?:100 Continue\r\n\r\nHTTP/1\.1 )?(\d{3}) ")


async def _send(address: tuple[str, int], request: bytes) -> bytes:
    """All that comes until the server closes; a request that is never complete is abandoned after a second."""
    reader, writer = await asyncio.open_connection(*address)
    received = b""
    try:
        writer.write(request)
        async with asyncio.timeout(1.0):
            while chunk := await reader.read(65536):
                received += chunk
    except (TimeoutError, ConnectionResetError, BrokenPipeError):
        pass
    finally:
        writer.transport.abort()
    return received


async def _fuzz_http(address: tuple[str, int], count: int) -> tuple[Counter[str], list[tuple[bytes, bytes]]]:
    """How often each status came ("none": no answer), and the requests whose answer may never be."""
    mutator, statuses, wrong = Mutator(SEED), Counter[str](), list[tuple[bytes, bytes]]()
    turn = iter(range(count))

    async def worker() -> None:
        for _ in turn:
            request = a_request(mutator)
            answer = await _send(address, request)
            found = _STATUS.match(answer)
            statuses[found[1].decode() if found else "none" if not answer else "junk"] += 1
            if (found and found[1] >= b"500" and found[1] not in (b"501", b"503", b"505")) or (answer and not found):
                wrong.append((request, answer[:300]))

    await asyncio.gather(*(worker() for _ in range(32)))
    return statuses, wrong


@pytest.mark.parametrize("count", [1_500, pytest.param(20_000, marks=long)])
def test_mutated_http_requests(world: World, count: int) -> None:
    url = httpx.URL(world.url)
    with Health(world.url) as health, growth(world.open.process.pid) as grown:
        statuses, wrong = asyncio.run(_fuzz_http((url.host, url.port or 0), count))
        world.idle()
    world.alive()
    world.good_http()
    assert not wrong, f"{len(wrong)} of seed {SEED}, the first: {wrong[0]}"
    assert statuses["200"] > count / 50 and statuses["400"] > count / 10 and statuses["none"] < count / 2, statuses
    figure(f"{count} mutated HTTP requests: /health p99", health.p99() * 1000, 100.0, "ms")
    figure(f"{count} mutated HTTP requests: memory of the router", max(0.0, grown[0]), 50.0, "MB")


# --- a replica that went mad


CAPACITY = Capacity(block_size=16, num_blocks=4096, max_batch_size=8, max_num_tokens=256, max_seq_len=1024, vocab_size=320, tp=1, pp=1)
HELLO = Hello(boot="mad", protocol=messages.PROTOCOL, replica="mad", model="m", epoch=1, resume="bitwise", capacity=CAPACITY)
BEAT = Heartbeat(boot="mad", step=1, busy_ms=0.0, predicted_ms=1.0, stats=EngineStats(running=1, free_blocks=4000, step_ms=1.0))


TASK = messages.GenerateTask(params=messages.SamplingParams())
NONE = Submit(boot="", stream=1, attempt=1, client="", request_id="", model="", prompt_ids=[], task=TASK)


def a_reply(mutator: Mutator, submits: list[Submit]) -> bytes:
    """One mutated message of the replica about submits that it really holds."""
    pick = mutator.random
    submit = pick.choice(submits)
    about = {"boot": "mad", "stream": submit.stream, "attempt": submit.attempt}
    usage = Usage(prompt_tokens=3, output_tokens=pick.randrange(3))
    scores = [[messages.Logprobs(65, -0.5, [65, 66], [-0.5, -1.0])]]
    failed = Failed(**about, code=pick.choice(("replica_lost", "engine_fault", "x")), message="m")
    message = pick.choice((
        HELLO, BEAT, Accepted(**about, seed=1, prompt_tokens=3), failed,
        Tokens(boot="mad", streams=[submit.stream], attempts=[submit.attempt], firsts=[0], tokens=[[65]], logprobs=scores),
        Tokens(boot="mad", streams=[submit.stream] * 2, attempts=[submit.attempt] * 2, firsts=[0, 1], tokens=[[65], [66]]),
        Done(**about, reason="stop", usage=usage), messages.Bye(boot="mad", reason="drained"),
    ))  # fmt: skip
    return messages.encode(message) if pick.random() < 0.2 else _spoilt(mutator, message)


@pytest.mark.parametrize("count", [4_000, pytest.param(50_000, marks=long)])
def test_mutated_frames_of_a_replica(count: int) -> None:
    """While clients wait for its answers. Afterwards the router serves by a sound replica as if nothing had been."""
    mutator = Mutator(SEED)
    limits = AdmissionSpec(max_queue=64, queue_timeout_s=1.0, request_timeout_s=1.0)
    with short_folder() as folder, RouterRun(folder, http=True, admission=limits) as router:
        url = router.wait_serving().http
        stop = threading.Event()
        statuses: Counter[int] = Counter()

        def client() -> None:
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
                while not stop.is_set():
                    statuses[http.post(TEXT, json=text(prompt=[1, 2, 3], max_tokens=8, logprobs=1)).status_code] += 1

        clients = [threading.Thread(target=client) for _ in range(4)]
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        mad = context.socket(zmq.DEALER)
        mad.linger, mad.sndhwm, mad.rcvhwm = 0, 100_000, 100_000
        mad.connect(router.spec.back)
        mad.send(messages.encode(HELLO))
        try:
            for thread in clients:
                thread.start()
            with Health(url) as health:
                submits = [NONE]
                for number in range(count):
                    mad.send(a_reply(mutator, submits))
                    while mad.poll(0 if number % 100 else 20):
                        message = messages.decode_to_replica(mad.recv())
                        if isinstance(message, Submit):
                            submits = [*submits[-7:], message]
        finally:
            stop.set()
            for thread in clients:
                thread.join(30)
            context.destroy(0)
        assert router.process.poll() is None
        assert "Traceback" not in router.log.read_text(), router.log.read_text()[-5000:]
        with Gang(folder, [router.spec.back], name="sound", tp=1):

            def served() -> bool:
                body = text(prompt=[1, 2, 3], max_tokens=4, ignore_eos=True)
                return httpx.post(url + TEXT, json=body, trust_env=False, timeout=30).status_code == 200

            wait_for(served, what="a good answer")
        assert sum(statuses.values()) > 0 and set(statuses) <= {200, 400, 429, 499, 500, 503, 504}, statuses
    figure(f"{count} mutated frames of a replica: /health p99", health.p99() * 1000, 100.0, "ms")
