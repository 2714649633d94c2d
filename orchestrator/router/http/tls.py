"""TLS of the HTTP API: the certificate in force, and connections from their first byte to the end of the handshake.

Owns the context of new connections, which is made anew when a file changes, and the connections whose handshake is not done. These count as
connections of their address already, for each has a descriptor. A handshake gets :data:`HANDSHAKE_S`; it runs on the event loop in pieces
of one message, so a client that is slow in it delays nobody.

    accepted --handshake--> served by the HTTP protocol
    accepted --too many connections, no valid handshake in time, no valid client certificate--> closed
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from orchestrator.config.router_spec import TlsConfig
from orchestrator.router.http.connections import Connections
from workers.protocol.errors import ConfigError

#: Seconds for a handshake.
HANDSHAKE_S = 10.0
#: Seconds until the next try where no connection can be accepted: there is no descriptor left.
RETRY_S = 0.1

log = logging.getLogger("trireme.tls")


class TlsFiles:
    """The files of ``config`` as a context. ``context``: that of the next connection. Raises ConfigError, which never quotes a file."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._seen = self._state()
        self.context = make_context(config)

    def refresh(self) -> None:
        """Take new files into use; files that are no use are reported, and new connections keep using the previous ones."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self.context = make_context(self._config)
        except ConfigError as error:
            log.error("%s; the certificate before stays in use", error)
        else:
            log.info("the certificate of the HTTP API was read again")

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stat(name) for name in (self._config.cert, self._config.key, self._config.client_ca) if name)


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or later; with ``client_ca``, only clients with a certificate of it. Raises ConfigError."""
    key = Path(config.key).expanduser()
    try:
        if key.stat().st_mode & 0o007:
            raise ConfigError(f"http.tls.key: {key} is readable by others", "it is the secret of the certificate", f"chmod o-rwx {key}")
    except OSError as error:
        raise ConfigError(f"http.tls.key: cannot read {key}", error.strerror or str(error), "name a file that exists") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a function that gives the password, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(Path(config.cert).expanduser(), key, password=lambda: "")
    except (OSError, ValueError) as error:
        why = f"{config.cert} and {config.key}: {_reason(error)}"
        hint = "both are PEM; the key belongs to the first certificate and has no password"
        raise ConfigError("http.tls: the certificate or its key cannot be used", why, hint) from None
    if config.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(Path(config.client_ca).expanduser())
        except (OSError, ValueError) as error:
            why = f"{config.client_ca}: {_reason(error)}"
            raise ConfigError("http.tls.client_ca: cannot be used", why, "name a PEM file of certificates") from None
    return context


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _stat(name: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(Path(name).expanduser())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


async def accept(listener: socket.socket, files: TlsFiles, connections: Connections, make_protocol: Callable[[], asyncio.Protocol]) -> None:
    """Accept connections until cancelled; each gets a protocol of ``make_protocol`` after its handshake."""
    loop = asyncio.get_running_loop()
    shaking: set[asyncio.Task[None]] = set()

    async def shake(connection: socket.socket, address: str) -> None:
        try:
            if connections.enter(address):
                connection.close()  # no answer can be sent before a handshake
                return
            await loop.connect_accepted_socket(
                make_protocol, connection, ssl=files.context, ssl_handshake_timeout=HANDSHAKE_S
            )  # fmt: skip
        except OSError as error:  # ssl.SSLError and TimeoutError too
            log.debug("no TLS with %s: %s", address, error)
            connection.close()
        finally:
            connections.leave(address)  # the protocol has entered for itself

    try:
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(RETRY_S)
                continue
            task = loop.create_task(shake(connection, address[0]))
            shaking.add(task)
            task.add_done_callback(shaking.discard)
    finally:
        for task in shaking:
            task.cancel()
