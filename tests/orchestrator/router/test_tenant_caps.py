"""One tenant's requests and their bodies take its share of a router's totals, in both frontends, and leave the rest to others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.auth.api_keys import ApiKeys, Salting, mint
from orchestrator.auth.curve_acl import CurveAcl, CurveGrant
from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.diagnostics import Diagnostics
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.metrics import Metrics
from orchestrator.router.rpc.server import RpcServer
from orchestrator.router.tenant_caps import Place, TenantCaps
from tests.support.raw_http import head
from tests.support.scripted_router import Play, ServedDoor, tiny_texts
from workers.protocol import messages
from workers.protocol.errors import Overloaded, TenantLimit, from_code
from workers.protocol.messages import Cancel, Failed, Generate, RouterHeartbeat

SMALL = AdmissionSpec(max_requests=8, max_bytes=4000)
CHAT = "/v1/chat/completions"


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(("enter", "add", "leave")), st.integers(0, 1500)), max_size=60))
def test_no_tenant_takes_more_than_its_share_and_no_order_loses_count(steps: list[tuple[str, str, int]]) -> None:
    caps = TenantCaps(SMALL)
    held: dict[str, list[tuple[Place, int]]] = {}
    for tenant, what, size in steps:
        places = held.setdefault(tenant, [])
        try:
            if what == "enter":
                places.append((caps.enter(tenant), 0))
            elif places and what == "add":
                place, has = places[-1]
                place.add(size)
                places[-1] = place, has + size
            elif places:
                place, _ = places.pop()
                place.leave()
                place.leave()
        except TenantLimit:
            assert len(places) >= 2 and (what == "enter" or sum(size for _, size in places) + size > 1000)
        except Overloaded:
            assert caps.requests == 8 or caps.bytes + size > 4000
        assert len(places) <= 2
        assert caps.requests == sum(map(len, held.values()))
        assert caps.bytes == sum(size for places in held.values() for _, size in places)


def test_a_share_holds_one_request_whatever_it_is() -> None:
    caps = TenantCaps(AdmissionSpec(max_requests=2, max_bytes=1024, tenant_share=0.001))
    caps.enter("a").add(1 << 20)
    with pytest.raises(TenantLimit):
        caps.enter("a")
    caps.enter("b")


def test_the_reason_crosses_the_wire() -> None:
    found = from_code("tenant_limit", "too many", retry_after=2.0)
    assert isinstance(found, TenantLimit) and isinstance(found, Overloaded) and found.retry_after == 2.0


def test_http_counts_by_key_and_leaves_the_others_alone(tmp_path: Path) -> None:
    (one, alice), (other, bob) = mint("alice", None, 0), mint("bob", None, 0)
    with ServedDoor(tmp_path, ApiKeys([alice, bob]), admission=SMALL) as door:
        door.dispatcher.script = lambda ask, choice: Play(hang=ask.request_id != "free")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        gone = threading.Event()

        def hang() -> None:
            with httpx.Client(base_url=door.url, timeout=20) as client, client.stream(
                "POST", CHAT, json={**body, "stream": True}, headers={"authorization": f"Bearer {one}"}
            ):  # fmt: skip
                gone.wait(20)

        threads = [threading.Thread(target=hang) for _ in range(2)]
        for thread in threads:
            thread.start()
        _wait(lambda: len(door.dispatcher.asks) == 2)
        refused = door.http.post(CHAT, json=body, headers={"authorization": f"Bearer {one}"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1 and "connection" not in refused.headers
        assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == ("rate_limit_error", "tenant_limit")
        door.dispatcher.script = lambda ask, choice: Play()
        assert door.http.post(CHAT, json=body, headers={"authorization": f"Bearer {other}"}).status_code == 200
        gone.set()
        for thread in threads:
            thread.join(20)
        _wait(lambda: door.caps.requests == 0)
        assert door.http.post(CHAT, json=body, headers={"authorization": f"Bearer {one}"}).status_code == 200
        assert (door.caps.requests, door.caps.bytes) == (0, 0)


def test_http_counts_the_bytes_of_bodies_that_have_come(tmp_path: Path) -> None:
    """Two of one address together; the third address is not concerned."""
    with ServedDoor(tmp_path, admission=SMALL) as door:
        with socket.create_connection(("127.0.0.1", door.port), timeout=10) as slow:
            slow.sendall(head(CHAT, 2000) + b" " * 900)
            _wait(lambda: door.caps.bytes == 900)
            body = b"{" + b" " * 200
            refused = door.http.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "tenant_limit"
            with socket.create_connection(("127.0.0.1", door.port), timeout=10, source_address=("127.0.0.2", 0)) as other:
                other.sendall(head(CHAT, len(body)) + body)
                assert other.recv(4096).startswith(b"HTTP/1.1 400 ")
        _wait(lambda: door.caps.bytes == 0)


def test_rpc_counts_by_key_and_by_connection(tmp_path: Path) -> None:
    """Alone on a local socket each connection is one tenant; keys of one name are one tenant together. An end makes room."""
    asyncio.run(_rpc(tmp_path))


async def _rpc(folder: Path) -> None:
    frames: list[tuple[bytes, Any]] = []
    texts = tiny_texts(folder)
    core = RouterCore(RouterHeartbeat(boot="R", router="r"), ["tiny"], SMALL, ReplicaRegistry(60.0, 60.0))
    dispatcher = RouterDispatcher(core, name="r", send=lambda peer, message: True, clock=time.monotonic)
    acl = CurveAcl({user: CurveGrant(role="client", name="alice") for user in ("k1", "k2")} | {"k3": CurveGrant(role="client")})
    caps = TenantCaps(SMALL)
    server = RpcServer(
        boot="R", dispatcher=dispatcher, preprocessor=Preprocessor(texts, dispatcher, SMALL, Salting(b"salt")), metrics=Metrics(["tiny"]),
        acl=acl, caps=caps, send=lambda peer, frame: not frames.append((peer, messages.decode_to_client(frame))),
        clock=time.monotonic, diagnostics=Diagnostics("r", dispatcher, None),
    )  # fmt: skip
    body = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}).encode()
    numbers = iter(range(1, 100))

    def ask(peer: bytes, user: str) -> tuple[int, str]:
        """(its stream, the code of its refusal or an empty text)."""
        stream = next(numbers)
        ask = Generate(boot=f"c-{peer.decode()}", stream=stream, request_id=f"q{stream}", endpoint="completions", body=body)
        frames.clear()
        server.on_frame(peer, user, messages.encode(ask))
        return stream, next((message.code for _, message in frames if isinstance(message, Failed)), "")

    try:
        first, _ = ask(b"p1", "k1")
        assert [ask(b"p2", "k2")[1], ask(b"p1", "k1")[1], ask(b"p2", "k2")[1]] == ["", "tenant_limit", "tenant_limit"]
        assert [ask(b"p3", "k3")[1], ask(b"p3", "k3")[1], ask(b"p3", "k3")[1]] == ["", "", "tenant_limit"]
        assert [ask(b"l1", "")[1], ask(b"l1", "")[1], ask(b"l1", "")[1], ask(b"l2", "")[1]] == ["", "", "tenant_limit", ""]
        server.on_frame(b"p1", "k1", messages.encode(Cancel(boot="c-p1", stream=first)))
        assert [ask(b"p2", "k2")[1], ask(b"p2", "k2")[1]] == ["", "tenant_limit"]
        assert caps.requests == server.live == 7
    finally:
        server.close()
        texts.close()
    assert caps.bytes > 0


def _wait(found: Any) -> None:
    until = time.monotonic() + 10
    while not found():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)
