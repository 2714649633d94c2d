"""What comes from outside goes nowhere but into the model: no address is called, no log line is forged, no tenant is told of another."""

from __future__ import annotations

import http.client
import math
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest

from orchestrator.auth.api_keys import Salting
from orchestrator.client import Client
from tests.inputs.table import image, schema
from tests.inputs.world import CHAT, TEXT, World, chat, text
from tests.support.figures import lines
from tests.support.raw_http import head
from tests.support.rpc_peer import Peer
from workers.protocol import messages

#: Everything but the line's end that moves a terminal's cursor or forges a line.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f\u2028\u2029\u202e]")
EVIL = "planted\r\nERROR forged line\x1b[31m\u202e\x85"


# --- S15: logs


def test_nothing_from_outside_forges_a_line_of_a_log(world: World) -> None:
    for body in (chat(model=EVIL), chat(messages=[{"role": EVIL, "content": EVIL}]), {EVIL: 1}, chat(**{EVIL: 1}), chat(stop=EVIL * 9)):
        answer = world.post(CHAT, body)
        assert not CONTROL.search(answer.text.replace("\n", "")), answer.text
    raw = EVIL.encode()
    for data in (
        b"GET /" + raw.split(b"\r")[0] + b"\x1b[31m HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: planted\x1b[31m\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: planted\x1b[31m\r\nauthorization: Bearer planted\x1b[31m\r\nconnection: close\r\n\r\n",
        b"PLANTED\x1b / HTTP/1.1\r\n\r\n",
        b"GET /%0d%0aplanted%1b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        head(CHAT, 3, "upgrade: planted\x1b", "connection: upgrade") + b"{}\n",
    ):
        with socket.create_connection(("127.0.0.1", httpx.URL(world.url).port), timeout=10) as connection:
            connection.sendall(data)
            connection.settimeout(3)
            received = b""
            try:
                while chunk := connection.recv(65536):
                    received += chunk
            except TimeoutError:
                pass
            assert b"\x1b" not in received and b"forged" not in received, received
    peer = Peer(world)
    try:
        for fields in (
            {"request_id": EVIL},
            {"boot": EVIL},
            {"request_id": secrets.token_hex(4), "body": msgspec.json.encode({EVIL: EVIL})},
        ):
            peer.tell(peer.generate(1, **{"request_id": secrets.token_hex(4), **fields}))
        peer.send(EVIL.encode())
        peer.send(messages.encode(messages.Query(boot=EVIL, stream=1, what="models")))
        peer.answers()
    finally:
        peer.close()
    world.good_http()
    for router in (world.open, world.keyed):
        log = router.log.read_text()
        assert not CONTROL.search(log) and "forged" not in log and "planted" not in log.lower(), log[-3000:]
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ \S+: ", line) for line in log.splitlines()), log[-3000:]
    assert "planted" not in world.gang.logs()


# --- S20: addresses


@contextmanager
def trap() -> Iterator[tuple[int, list[str]]]:
    """A port where nobody may ever call, and who did."""
    callers: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            callers.append(str(address))
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield int(listener.getsockname()[1]), callers
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_no_address_in_a_request_is_called(world: World) -> None:
    with trap() as (port, callers):
        url = f"http://127.0.0.1:{port}/x"
        user = {"role": "user", "content": "x"}
        bodies: list[tuple[str, Any]] = [
            (CHAT, image(url)),
            (CHAT, chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}]}])),
            (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": url}], "image_url": url}])),
            (CHAT, chat(messages=[user | {"content": f"![x]({url}) <img src='{url}'>"}])),
            (CHAT, schema({"$ref": url})),
            (CHAT, schema({"$schema": url, "$id": url, "type": "object", "properties": {"a": {"$ref": f"{url}#/a"}}})),
            (CHAT, schema({"$schema": url, "$id": url, "type": "object"})),
            (CHAT, chat(guided_json=url)),
            (CHAT, chat(guided_grammar=f"%import {url}\nstart: /a/")),
            (CHAT, chat(model=url)),
            (CHAT, chat(chat_template=url)),
            (CHAT, chat(chat_template_kwargs={"documents_url": url}, user=url, metadata={"url": url}, webhook=url)),
            (CHAT, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"$ref": url}}}], tool_choice="required")),
            (TEXT, text(prompt=url, cache_salt=url)),
        ]
        statuses = [world.post(path, body).status_code for path, body in bodies]
        assert set(statuses) <= {200, 400, 404}, statuses
        headers = {"x-forwarded-for": f"127.0.0.1:{port}", "forwarded": f"for=127.0.0.1:{port}", "referer": url, "x-correlation-id": url}
        assert world.http.get("/v1/models", headers=headers).status_code == 200
        assert world.http.get(f"/v1/models/{url}").status_code == 404
        world.good_http()
        assert not callers, f"somebody called {callers}"
        # The trap itself works.
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()
        deadline = time.monotonic() + 10
        while not callers and time.monotonic() < deadline:
            time.sleep(0.01)
        assert callers


# --- S16: time


def same_distribution(one: list[float], other: list[float]) -> float:
    """p of the two-sample Kolmogorov-Smirnov test, by its asymptotic series (Smirnov 1948)."""
    values = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    counts, distance = [0, 0], 0.0
    for _, which in values:
        counts[which] += 1
        distance = max(distance, abs(counts[0] / len(one) - counts[1] / len(other)))
    root = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * scaled * scaled) for k in range(1, 101)))


def test_the_test_of_distributions_can_tell() -> None:
    chance = random.Random(1)
    alike = [[chance.gauss(0, 1) for _ in range(200)] for _ in range(2)]
    assert same_distribution(*alike) > 0.01
    assert same_distribution(alike[0], [value + 1 for value in alike[1]]) < 1e-6


def _probe(client: Client, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and the cached tokens that the answer admits."""
    started = time.monotonic()
    call = client.complete(prompt, texts=False, max_tokens=1, temperature=0, ignore_eos=True)
    next(call.stream())
    took = time.monotonic() - started
    return took, call.result().choices[0].usage.cached_tokens


@pytest.mark.parametrize("probes", [60, pytest.param(200, marks=pytest.mark.long)])
def test_time_tells_nothing_of_other_tenants(world: World, probes: int) -> None:
    """Alice has asked a prompt. Bob probes it and one that nobody asked: the times to his first token are of one distribution. Alice's own
    second question is faster, so there was something to see. By chance alone one run in a hundred fails: three must."""
    with world.connect("bob") as bob:
        for _ in range(3):
            chance = random.Random()
            times: dict[str, list[float]] = {"asked by alice": [], "asked by nobody": [], "alice again": []}
            for _ in range(probes):
                known, fresh = ([chance.randrange(256) for _ in range(320)] for _ in range(2))
                _probe(world.client, known)
                order = [("asked by alice", known), ("asked by nobody", fresh)]
                chance.shuffle(order)
                for name, prompt in order:
                    took, cached = _probe(bob, prompt)
                    assert cached == 0, "another tenant's prefix was counted"
                    times[name].append(took)
                took, cached = _probe(world.client, known)
                assert cached > 0
                times["alice again"].append(took)
            p = same_distribution(times["asked by alice"], times["asked by nobody"])
            seen = same_distribution(times["asked by nobody"], times["alice again"])
            lines.append(f"S16 {probes} probes: KS p across tenants {p:.3g} / > 0.01; within a tenant {seen:.1e} / < 0.001")
            assert seen < 0.001, "a hit within a tenant cannot be seen: the probe shows nothing"
            if p > 0.01:
                return
    raise AssertionError("the times to a first token tell what another tenant asked")


def test_the_salt_of_a_tenant_never_leaves(world: World) -> None:
    """Neither an answer, a metric nor the status holds what tenants' prefixes are found by."""
    salts = [Salting(world.ring.salt_file.read_bytes()).of(tenant, "") for tenant in ("", "alice", "bob")]
    world.good_rpc()
    seen = msgspec.json.encode(world.client.status()).decode() + world.client.metrics() + world.keyed.log.read_text() + world.gang.logs()
    assert not any(salt in seen for salt in salts)
