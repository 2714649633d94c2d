"""Idle connections of one address take a quarter of the descriptors at most."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.router.http.client_address import networks
from orchestrator.router.http.connections import Connections
from tests.support.scripted_router import ServedDoor


def test_counts_by_host_and_in_all() -> None:
    connections = Connections(4, 2)
    assert [connections.enter("2001:db8::1"), connections.enter("2001:db8::2")] == ["", ""]
    assert "of this address" in connections.enter("2001:db8::3")
    connections.leave("2001:db8::3")
    assert [connections.enter("::ffff:192.0.2.1"), connections.enter("192.0.2.1")] == ["", ""]
    assert connections.enter("192.0.2.9") == "4 connections are open here"
    for address in ("192.0.2.9", "192.0.2.1"):
        connections.leave(address)
    assert connections.enter("192.0.2.9") == ""


def test_a_trusted_proxy_brings_connections_of_many() -> None:
    connections = Connections(3, 1, networks(("10.0.0.0/8",)))
    assert [connections.enter("10.0.0.1") for _ in range(4)] == ["", "", "", "3 connections are open here"]


def test_one_address_cannot_take_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connections, "of_this_process", classmethod(lambda cls, trusted: cls(40, 20, trusted)))
    with ServedDoor(tmp_path) as door, ExitStack() as held:
        for _ in range(20):
            held.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=10))
        with socket.create_connection(("127.0.0.1", door.port), timeout=10) as refused:
            said = refused.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 429 ") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
        with socket.create_connection(("127.0.0.1", door.port), timeout=10, source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
        held.close()
        assert door.http.get("/health").status_code == 200


@pytest.mark.parametrize(("soft", "hard", "said"), [(300, 600, "600 300 150"), (100, 100, "only 100 descriptors are allowed")])
def test_the_limit_is_raised_and_checked(soft: int, hard: int, said: str) -> None:
    code = (
        "from orchestrator.router.http.connections import *\nfrom workers.protocol.errors import TriremeError\n"
        "try:\n    made = (raise_descriptor_limit(), Connections.of_this_process())\n"
        "    print(made[0], made[1].most, made[1].most_of_one)\nexcept TriremeError as error:\n    print(error)"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # noqa: E731
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=limit)
    assert said in ran.stdout
