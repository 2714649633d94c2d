"""Where the HTTP door may listen."""

from __future__ import annotations

import socket

import pytest

from orchestrator.config.router_spec import HttpSpec
from orchestrator.router.http.server import bind
from workers.protocol.errors import ConfigError, EnvironmentFault


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_only_loopback(host: str) -> None:
    with pytest.raises(ConfigError):
        bind(HttpSpec(host=host, port=0))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_callers_queue_from_the_bind_on(host: str) -> None:
    with bind(HttpSpec(host=host, port=0)) as listener:
        address = listener.getsockname()
        socket.create_connection(address, timeout=5).close()


def test_a_taken_port_is_said_so() -> None:
    with bind(HttpSpec(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"{port}: another process listens there"):
            bind(HttpSpec(port=port))


def test_routers_may_share_a_port() -> None:
    with bind(HttpSpec(port=0, reuse_port=True)) as listener:
        bind(HttpSpec(port=listener.getsockname()[1], reuse_port=True)).close()
