"""The HTTP server: the listening socket, and uvicorn on the router's own event loop.

Owns the socket. Without API keys it binds loopback addresses only, unless the spec says otherwise. The router process handles signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from orchestrator.config.router_spec import HttpSpec
from orchestrator.router.http.client_address import networks
from orchestrator.router.http.connections import Connections
from orchestrator.router.http.protocol import BoundedProtocol
from orchestrator.router.http.tls import TlsFiles, accept
from workers.protocol.errors import ConfigError, EnvironmentFault

BACKLOG = 2048
KEEP_ALIVE_S = 75
#: Send buffer of a connection, bytes. The kernel's own default grows to megabytes, which a stalled reader would fill with tokens.
SEND_BUFFER = 64 << 10


def bind(spec: HttpSpec) -> socket.socket:
    """A listening socket. Raises ConfigError for a host that needs API keys or TLS, EnvironmentFault for a port that is in use."""
    host = "127.0.0.1" if spec.host == "localhost" else spec.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"http host {spec.host!r} is not an IP address", hint="use 127.0.0.1") from None
    if not address.is_loopback and not spec.api_keys_file and not spec.insecure_without_keys:
        raise ConfigError(
            f"http host {spec.host} is not a loopback address",
            "without API keys the HTTP API must not be reachable from other machines",
            "name an api_keys_file, or use 127.0.0.1",
        )
    if not address.is_loopback and spec.tls is None and not spec.insecure_without_tls and not spec.insecure_without_keys:
        raise ConfigError(
            f"http host {spec.host} is not a loopback address",
            "without TLS the HTTP API must not be reachable from other machines",
            "name cert and key in tls, or use 127.0.0.1",
        )
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if spec.reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, spec.port))
        # From here on callers are queued, so the address can be used before the server runs.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why = "another process listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise EnvironmentFault(f"cannot bind {host}:{spec.port}", why, "stop it, or choose another port (0 = any free one)") from None
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    """``stop``: ends it when it is set."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event) -> None:
        super().__init__(config)
        self._stop = stop

    async def main_loop(self) -> None:
        """Keep the date in the head of answers right. (uvicorn's own loop wakes ten times a second, to see whether it is to end.)"""
        while not self._stop.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers: the router process has its own."""
        yield


async def serve(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    tls: TlsFiles | None = None,
    trusted_proxies: Sequence[str] = (),
    grace_s: float = 30.0,
) -> None:
    """Serve until ``stop`` is set; then accept nothing new, let requests finish for ``grace_s``, and cancel the rest."""
    connections = Connections.of_this_process(networks(trusted_proxies))
    make_protocol = partial(BoundedProtocol, connections)
    config = uvicorn.Config(
        app,
        http=make_protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        # At lower levels uvicorn logs every broken request, so a caller could fill the disk.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the application reads them, from trusted proxies alone
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        backlog=BACKLOG,
    )
    server = _Server(config, stop)
    config.load()
    serving = asyncio.create_task(server.serve(sockets=[listener] if tls is None else []))
    made = partial(make_protocol, config=config, server_state=server.server_state, app_state={})
    accepting = asyncio.create_task(accept(listener, tls, connections, made)) if tls is not None else None
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if accepting is not None:
            accepting.cancel()
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        if accepting is not None:
            accepting.cancel()
            listener.close()
        serving.cancel()
