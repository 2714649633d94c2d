"""What HTTP itself asks of a server, whoever the client is: other protocols, old versions, answers before the body, broken requests."""

from __future__ import annotations

import http.client
import json
import logging
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from orchestrator.auth.api_keys import ApiKeys, mint
from tests.support.raw_http import head
from tests.support.scripted_router import ServedDoor

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({**json.loads(BODY), "stream": True}).encode()
UPGRADES = ("h2c", "websocket", "TLS/1.0, HTTP/1.1", "x" * 100)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer")) as served:
        yield served


def connect(door: ServedDoor) -> socket.socket:
    return socket.create_connection(("127.0.0.1", door.port), timeout=10)


def answer(connection: socket.socket, method: str = "POST") -> tuple[http.client.HTTPResponse, bytes]:
    """The next answer on a connection, as the standard library's client reads it."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response, response.read()


def received(door: ServedDoor, data: bytes) -> bytes:
    """What the server says until it closes."""
    with connect(door) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def curl(*arguments: str) -> str:
    ran = subprocess.run(["curl", "-sS", "--max-time", "10", *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("wish", UPGRADES)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_wish_for_another_protocol_is_ignored(door: ServedDoor, wish: str, size: int) -> None:
    """RFC 9110, 7.8. In pieces of every size, with a body, with chunks, with none; and what follows on the connection is served."""
    more = ("connection: Upgrade, HTTP2-Settings", f"upgrade: {wish}", "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA")
    chunked = head(CHAT, 0, *more).replace(b"content-length: 0", b"transfer-encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(BODY),
        BODY,
    )
    get = "\r\n".join(["GET /health HTTP/1.1", "host: x", *more, "", ""]).encode()
    with connect(door) as connection:
        for data in (head(CHAT, len(BODY), *more) + BODY, chunked, get, head(CHAT, len(BODY)) + BODY):
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
            response, body = answer(connection, "GET" if data is get else "POST")
            assert response.status == 200 and response.getheader("upgrade") is None
            assert (json.loads(body) == {"status": "ok"}) == (data is get)


def test_requests_behind_a_wish_are_served_in_order(door: ServedDoor) -> None:
    wish = head(CHAT, len(BODY), "connection: upgrade", "upgrade: h2c") + BODY
    with connect(door) as connection:
        connection.sendall(wish + wish + head("/tokenize", 2) + b"{}")
        reader = connection.makefile("rb")
        statuses = []
        for _ in range(3):
            statuses.append(int(reader.readline().split()[1]))
            fields = http.client.parse_headers(reader)
            reader.read(int(fields["content-length"]))
    assert statuses == [200, 200, 400]


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_curl(door: ServedDoor, version: str, body: bytes) -> None:
    said = curl(version, "-H", "content-type: application/json", "-d", body.decode(), f"{door.url}{CHAT}")
    if body is BODY:
        assert json.loads(said)["choices"][0]["message"]["content"] == "Hello, world"
    else:
        events = [line for line in said.split("\n") if line]
        assert all(line.startswith("data: ") for line in events) and events[-1] == "data: [DONE]"


@pytest.mark.parametrize("keep", ["", "connection: keep-alive"])
def test_http_1_0_gets_no_chunks(door: ServedDoor, keep: str) -> None:
    """RFC 9112, 7.1: the end of the connection is the end of the answer. And no 100 Continue (RFC 9110, 10.1.1)."""
    lines = [f"POST {CHAT} HTTP/1.0", "content-type: application/json", f"content-length: {len(STREAM)}", "expect: 100-continue", keep]
    said = received(door, "\r\n".join([*filter(None, lines), "", ""]).encode() + STREAM)
    start, _, body = said.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 200 ") and b"transfer-encoding" not in start and b"connection: close" in start
    assert all(line.startswith(b"data: ") for line in body.split(b"\n") if line) and body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/2.0\r\n\r\n", 505), (b"GET / HTTP/0.9\r\n\r\n", 505), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n", 501), (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_not_spoken_here_is_refused_in_words(door: ServedDoor, data: bytes, status: int) -> None:
    start, _, body = received(door, data).partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 %d " % status)
    assert "\n" not in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "the body later"])
def test_a_refusal_keeps_the_connection(tmp_path_factory: pytest.TempPathFactory, late: bool) -> None:
    """Of every status; whether the body comes with the head or after the answer."""
    _, row = mint("alice", None, 0)
    broken = b"{" + b" " * 100
    with ServedDoor(tmp_path_factory.mktemp("keys"), ApiKeys([row])) as locked, ServedDoor(tmp_path_factory.mktemp("open")) as door:
        for served, data, status in (
            (locked, head(CHAT, len(BODY)) + BODY, 401),
            (door, head("/nothing", len(BODY)) + BODY, 404),
            (door, head("/health", len(BODY)) + BODY, 405),
            (door, head(CHAT, len(BODY), "content-encoding: gzip") + BODY, 415),
            (door, head(CHAT, len(broken)) + broken, 400),
        ):
            with connect(served) as connection:
                cut = data.index(b"\r\n\r\n") + 4 if late and status != 400 else len(data)
                for _ in range(2):
                    connection.sendall(data[:cut])
                    response, _ = answer(connection)
                    assert (response.status, response.getheader("connection")) == (status, None)
                    connection.sendall(data[cut:])
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert answer(connection, "GET")[0].status == 200


@pytest.mark.parametrize("more", [(), ("expect: 100-continue",)])
def test_a_refusal_before_a_long_body_arrives_and_ends_the_connection(door: ServedDoor, more: tuple[str, ...]) -> None:
    """The client sends on for a while, as clients do that read only afterwards, and still gets the answer."""
    length = 64 if more else 4 << 20
    with connect(door) as connection:
        connection.sendall(head(CHAT, length, "content-encoding: gzip", *more))
        if not more:
            connection.sendall(b" " * (3 << 20))
        response, body = answer(connection)
        assert (response.status, response.getheader("connection")) == (415 if more else 413, "close")
        assert json.loads(body)["error"]["message"]
        assert connection.recv(1) == b""


def test_a_client_that_leaves_inside_its_body_makes_no_trace(door: ServedDoor, caplog: pytest.LogCaptureFixture) -> None:
    """With a body whose rest would be read, and with one that ends the connection; by an end and by a reset."""
    with caplog.at_level(logging.WARNING):
        for length in (64, 400 << 10):
            for linger in (b"\0" * 8, struct.pack("ii", 1, 0)):
                with connect(door) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.sendall(head(CHAT, length) + b" " * 32)
                    assert httpx.get(f"{door.url}/health").status_code == 200  # the head has been read
        assert httpx.get(f"{door.url}/health").status_code == 200
    assert caplog.text == ""


def test_no_input_makes_a_trace(door: ServedDoor, caplog: pytest.LogCaptureFixture) -> None:
    """Requests with bytes cut, doubled and changed: answers are one line of JSON, and the log stays silent."""
    random_bytes = random.Random(7)
    seeds = [
        head(CHAT, len(BODY), "connection: upgrade", "upgrade: h2c") + BODY, head(CHAT, len(BODY)) + BODY,
        b"GET /health HTTP/1.0\r\n\r\n", b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            data = bytearray(random_bytes.choice(seeds))
            for _ in range(random_bytes.randint(1, 4)):
                at = random_bytes.randrange(len(data))
                data[at : at + random_bytes.choice((0, 1, 1, 8))] = random_bytes.randbytes(random_bytes.choice((0, 1, 1, 4)))
            with connect(door) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.02)
                try:
                    said = connection.recv(65536)
                except (TimeoutError, ConnectionResetError):
                    continue
                assert not said or said.startswith(b"HTTP/1.1 ")
                assert b"Traceback" not in said
        assert httpx.get(f"{door.url}/health").status_code == 200
    assert caplog.text == ""


NODE = """
const [url, body] = process.argv.slice(1);
const ask = (path, init) => fetch(url + path, init);
const post = {method: "POST", headers: {"content-type": "application/json"}};
const read = async answer => [answer.status, await answer.text()];
(async () => {
  const found = [];
  for (let i = 0; i < 3; i++) {
    found.push((await read(await ask("/nothing", {...post, body}))) [0]);
    found.push((await read(await ask("/v1/chat/completions", {...post, body: "{"}))) [0]);
    found.push((await read(await ask("/health", {...post, body}))) [0]);
    found.push((await read(await ask("/v1/chat/completions", {...post, body: "x".repeat(4 << 20)}))) [0]);
    found.push((await read(await ask("/v1/chat/completions", {...post, body}))) [0]);
    const streamed = await ask("/v1/chat/completions", {...post, body: JSON.stringify({...JSON.parse(body), stream: true})});
    let text = "";
    for await (const piece of streamed.body) text += Buffer.from(piece).toString();
    found.push(text.trimEnd().endsWith("data: [DONE]"));
  }
  console.log(JSON.stringify(found));
})().catch(error => { console.error(error); process.exit(1); });
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_nodes_fetch(door: ServedDoor) -> None:
    """Refusals of every kind, among them one before the end of a large body, and good requests between them, on kept connections."""
    ran = subprocess.run(["node", "-e", NODE, door.url, BODY.decode()], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [404, 400, 405, 413, 200, True] * 3
