"""Who a proxy says that its client is: RFC 7239's examples, the usual X-Forwarded-For, and what a client may write itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.router_spec import HttpConfig
from orchestrator.router.http.client_address import client_of, networks, tenant_address
from tests.support.scripted_router import ServedDoor
from workers.protocol.errors import ConfigError

TRUSTED = networks(("10.0.0.0/8", "2001:db8:1::/48"))
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("192.0.2.1", [("x-forwarded-for", "198.51.100.7")], "192.0.2.1"),  # the peer is no proxy of ours
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [("x-forwarded-for", "198.51.100.7")], "198.51.100.7"),
        ("::ffff:10.0.0.1", [("x-forwarded-for", "198.51.100.7")], "198.51.100.7"),
        ("10.0.0.1", [("x-forwarded-for", "203.0.113.9, 198.51.100.7, 10.0.0.2")], "198.51.100.7"),  # the left one may be made up
        ("10.0.0.1", [("x-forwarded-for", "203.0.113.9"), ("x-forwarded-for", "198.51.100.7")], "198.51.100.7"),
        ("10.0.0.1", [("x-forwarded-for", "10.0.0.3, 10.0.0.2")], "10.0.0.3"),
        ("10.0.0.1", [("x-forwarded-for", "198.51.100.7:4711")], "198.51.100.7"),
        ("10.0.0.1", [("x-forwarded-for", "[2001:db8::7]:4711")], "2001:db8::7"),
        ("10.0.0.1", [("x-forwarded-for", "2001:db8::7")], "2001:db8::7"),
        ("10.0.0.1", [("x-forwarded-for", "198.51.100.7, unknown")], "10.0.0.1"),
        ("10.0.0.1", [("x-forwarded-for", "198.51.100.7, , 10.0.0.2")], "10.0.0.2"),
        ("2001:db8:1::1", [("forwarded", "for=192.0.2.60;proto=http;by=203.0.113.43")], "192.0.2.60"),  # RFC 7239, 4
        ("10.0.0.1", [("forwarded", 'For="[2001:db8:cafe::17]:4711"')], "2001:db8:cafe::17"),
        ("10.0.0.1", [("forwarded", "for=192.0.2.43, for=198.51.100.17")], "198.51.100.17"),
        ("10.0.0.1", [("forwarded", 'proto=https;for="_hidden"')], "10.0.0.1"),
        ("10.0.0.1", [("forwarded", "by=10.0.0.1")], "10.0.0.1"),
        ("10.0.0.1", [("forwarded", "for=192.0.2.9"), ("x-forwarded-for", "192.0.2.9")], "192.0.2.9"),
        ("10.0.0.1", [("forwarded", "for=203.0.113.9"), ("x-forwarded-for", "192.0.2.9")], "10.0.0.1"),  # one of them is the client's
    ],
)
def test_the_right_most_address_that_is_no_proxy(peer: str, headers: list[tuple[str, str]], client: str) -> None:
    assert client_of(peer, [(name.encode(), value.encode()) for name, value in headers], TRUSTED) == client


def test_addresses_as_tenants() -> None:
    assert tenant_address("192.0.2.7") == tenant_address("::ffff:192.0.2.7") == "192.0.2.7"
    assert tenant_address("2001:db8::7") == tenant_address("2001:db8::ffff") == "2001:db8::/64" != tenant_address("2001:db8:0:1::7")


def test_a_request_is_its_clients_only_behind_a_trusted_proxy(tmp_path: Path) -> None:
    named = {"x-forwarded-for": "198.51.100.7"}
    for trusted, tenant in (((), "127.0.0.1"), (("127.0.0.0/8",), "198.51.100.7")):
        with ServedDoor(tmp_path, trusted_proxies=trusted) as door:
            assert door.http.post(CHAT, json=BODY, headers=named).status_code == 200
            assert door.dispatcher.asks[-1].tenant == tenant


@pytest.mark.parametrize("wrong", ["proxy.example.org", "10.0.0.1/8", "10.0.0.0/33", ""])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="trusted_proxies"):
        HttpConfig(trusted_proxies=(wrong,))
