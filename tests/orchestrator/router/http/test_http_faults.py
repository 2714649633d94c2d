"""What goes wrong behind an HTTP request that was taken: clients that leave or stop reading, faults of the dispatcher and of our own.

Input that is refused has tables of its own, in ``tests/inputs``.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scripted_router import Play, ServedDoor
from workers.protocol.errors import EngineFault, Overloaded

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer")) as door:
        yield door


@pytest.fixture
def door(served: ServedDoor) -> Iterator[ServedDoor]:
    served.dispatcher.reset()
    yield served
    served.dispatcher.reset()
    good = served.http.post(CHAT, json={"model": "tiny", "messages": HELLO})
    assert good.json()["choices"][0]["message"]["content"] == "Hello, world"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **fields}


def until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=2.0), RuntimeError("a bug")])
def test_what_the_dispatcher_refuses_is_not_in_flight(door: ServedDoor, error: Exception) -> None:
    """And is counted once: as refused, not as a choice that failed after admission too."""
    before = dict(door.metrics.models["tiny"].errors)
    door.dispatcher.refusal = error  # type: ignore[assignment]
    answer = door.http.post(CHAT, json=chat())
    assert answer.status_code == (429 if isinstance(error, Overloaded) else 500)
    assert answer.json()["error"]["code"] == ("overloaded" if isinstance(error, Overloaded) else "internal_error")
    assert door.metrics.models["tiny"].in_flight == 0
    assert door.metrics.models["tiny"].errors == before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("text", ["", "some"])
def test_a_client_that_leaves_frees_its_choices(door: ServedDoor, stream: bool, text: str) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text=text, hang=True)
    body = json.dumps(chat(stream=stream, n=2)).encode()
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body))
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(head + body)
        until(lambda: door.dispatcher.tickets and sum(door.dispatcher.tickets[0].sent) == 2 * len(text))
    assert door.dispatcher.cancelled.wait(5)
    until(lambda: door.metrics.models["tiny"].in_flight == 0)
    assert sum(door.metrics.models["tiny"].errors.values()) == 0


def test_a_reader_that_stops_stops_the_generation(door: ServedDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.router.http.event_stream.STALL_S", 2.0)
    door.dispatcher.script = lambda ask, choice: Play(text="x" * 1000, hang=True)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", door.port))
        # Several prompts on one connection: more text than the sockets between can hold, from a context that is small.
        body = json.dumps(text(prompt=["a"] * 8, stream=True, logprobs=20, max_tokens=1000)).encode()
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (TEXT.encode(), len(body))
        connection.sendall(head + body)
        assert door.dispatcher.starved.wait(60), "generation went on without credit"
        assert door.dispatcher.cancelled.wait(60), "the reader was not cut"
    assert all(sum(ticket.sent) < 1000 for ticket in door.dispatcher.tickets)


def test_an_error_after_the_first_byte_ends_the_stream(door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(text="ab", error=EngineFault("not finite", code="nan_logits"))
    answer = door.http.post(CHAT, json=chat(stream=True)).text
    last = answer.rstrip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == "nan_logits"
    assert "[DONE]" not in answer


def test_a_fault_of_our_own_tells_nothing_of_us(door: ServedDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(door.dispatcher, "model", lambda name: {}["secret"])
        response = door.http.post(CHAT, json=chat())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error" and "secret" not in response.text


def raw(door: ServedDoor, data: bytes) -> bytes:
    """What the server answers to ``data`` until it closes."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_slow_heads_and_bodies_are_cut(door: ServedDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.router.http.protocol.HEADER_DEADLINE_S", 0.3)
    monkeypatch.setattr("orchestrator.router.http.protocol.BODY_DEADLINE_S", 0.3)
    assert raw(door, b"GET /health HTTP/1.1\r\nhos").startswith(b"HTTP/1.1 408 ")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    assert raw(door, head).startswith(b"HTTP/1.1 408 ")


def test_a_server_that_was_frozen_does_not_blame_its_clients(door: ServedDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop stands still for longer than a head may take; the client was frozen too, and sends the rest when both go on."""
    monkeypatch.setattr("orchestrator.router.http.protocol.HEADER_DEADLINE_S", 1.0)
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhos")
        time.sleep(0.1)
        door.freeze(1.5)
        time.sleep(1.7)
        connection.sendall(b"t: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
