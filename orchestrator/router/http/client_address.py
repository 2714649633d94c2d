"""Whose request it is, by address: the peer's, or the one that a trusted proxy names.

Owns the meaning of ``Forwarded`` (RFC 7239) and ``X-Forwarded-For``. Both are read from the right, and the first address that is no
trusted proxy is the client's: what stands left of it the client may have written itself.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from starlette.types import ASGIApp, Receive, Scope, Send

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
#: The parameter ``for`` of one element of ``Forwarded``.
_FOR = re.compile(r'(?:^|;)\s*for\s*=\s*(?:"([^"]*)"|([^;,"]*))', re.IGNORECASE)
_PORT = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?")
_HEADERS = (b"forwarded", b"x-forwarded-for")


def networks(trusted: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and networks (``10.0.0.0/8``) as they stand in a deployment file. Raises ValueError."""
    return tuple(ipaddress.ip_network(one) for one in trusted)


def address_of(text: str) -> Address | None:
    """An address, with or without brackets and port; an IPv4 address that is written as IPv6 becomes one of IPv4. None: it is none."""
    text = text.strip()
    found = _PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address((found["v6"] or found["v4"] or "") if found else text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def tenant_address(address: str) -> str:
    """The address as a tenant: of IPv6 the network of the first 64 bits, for a host may use all addresses in it."""
    found = address_of(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return str(found or address)


def is_trusted(address: Address | None, trusted: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in trusted)


def forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the request says that it came by way of a proxy."""
    return any(name in _HEADERS for name, _ in headers)


def client_of(peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]) -> str:
    """The client's address. Where both headers are there and name different clients, one of them is not the proxy's, and neither counts."""
    if not trusted or not is_trusted(address_of(peer), trusted):
        return peer
    found = [(name, value.decode("latin-1")) for name, value in headers if name in _HEADERS]
    clients = {_client(peer, _hops(name, found), trusted) for name in {name for name, _ in found}}
    return clients.pop() if len(clients) == 1 else peer


def _hops(name: bytes, found: list[tuple[bytes, str]]) -> list[str]:
    """What the header's elements say, left to right; several headers of one name are one list (RFC 9110, 5.3)."""
    elements = [part for one, value in found if one == name for part in value.split(",")]
    if name == b"x-forwarded-for":
        return elements
    matches = [_FOR.search(element) for element in elements]
    return [(match[1] or match[2] or "") if match else "" for match in matches]


def _client(peer: str, hops: list[str], trusted: Sequence[Network]) -> str:
    client = peer
    for hop in reversed(hops):
        address = address_of(hop)
        if address is None:
            break  # `unknown`, a hidden name, or nonsense: the last proxy is all that is known
        client = str(address)
        if not is_trusted(address, trusted):
            break
    return client


class ClientAddressMiddleware:
    """ASGI middleware: puts the client's address into the scope in place of a trusted proxy's."""

    def __init__(self, app: ASGIApp, trusted: Sequence[Network]) -> None:
        self._app, self._trusted = app, trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope.get("client")
        if peer is not None:
            client = client_of(peer[0], scope["headers"], self._trusted)
            if client != peer[0]:
                scope["client"] = (client, 0)
        await self._app(scope, receive, send)
