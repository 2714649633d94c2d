"""The ZAP handler of a router: libzmq calls it for every CURVE handshake of the process's ZeroMQ context.

Owns the ``inproc://zeromq.zap.01`` socket. A socket's ZAP domain is the role that its peers must have. The handler runs on the router's own
event loop. The bound sockets set ``ZAP_ENFORCE_DOMAIN``, so without an answer every handshake fails.
"""

from __future__ import annotations

import asyncio
import logging
import time

import zmq
from zmq.utils import z85

from orchestrator.auth.curve_acl import CurveAcl

_ENDPOINT = "inproc://zeromq.zap.01"
#: Seconds between two warnings.
_WARN_S = 5.0

log = logging.getLogger("trireme.zap")


class ZapHandler:
    """Answers handshakes by ``acl``. ``refused``: handshakes refused since the start."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], acl: CurveAcl) -> None:
        self._acl = acl
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)
        self._warned_at = -_WARN_S
        self.refused = 0

    def start(self) -> None:
        """Serve on the running event loop until :meth:`close`."""
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)
        self._drain()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _drain(self) -> None:
        """Read until nothing is left, because the descriptor is edge-triggered. A send may consume the next edge, so the loop is around
        both."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(frames))

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        if len(frames) != 7 or frames[5] != b"CURVE" or len(frames[6]) != 32:
            return self._refuse(frames, "only CURVE is spoken here")
        user = z85.encode(frames[6]).decode()
        role = frames[2].decode("utf-8", "replace")
        if not self._acl.admits(user, role):
            return self._refuse(frames, f"the key {user} is not known as a {role}")
        return [b"1.0", frames[1], b"200", b"OK", user.encode(), b""]

    def _refuse(self, frames: list[bytes], why: str) -> list[bytes]:
        self.refused += 1
        now = time.monotonic()
        if now - self._warned_at >= _WARN_S:
            self._warned_at = now
            address = ascii(frames[3][:64].decode("utf-8", "replace")) if len(frames) > 3 else "?"
            log.warning("refused a connection from %s: %s (%d refused so far)", address, why, self.refused)
        return [b"1.0", frames[1] if len(frames) > 1 else b"", b"400", b"refused", b"", b""]
