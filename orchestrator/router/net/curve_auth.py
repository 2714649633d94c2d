"""The ZAP handler of a router: libzmq asks it about every CURVE handshake of the process's context.

Owns the ``inproc://zeromq.zap.01`` socket. A socket's ZAP domain is the role that its peers must have. It runs on the router's own loop,
and the bound sockets set ``ZAP_ENFORCE_DOMAIN``: where nobody answers, nobody is let in.
"""

from __future__ import annotations

import asyncio
import logging
import time

import zmq
from zmq.utils import z85

from orchestrator.auth.curve_acl import CurveAcl

_ENDPOINT = "inproc://zeromq.zap.01"
_COMPLAIN_S = 5.0

log = logging.getLogger("trireme.zap")


class ZapHandler:
    """Answers handshakes from ``gate``. ``refused``: handshakes turned down since start."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], gate: CurveAcl) -> None:
        self._gate = gate
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)
        self._complained = -_COMPLAIN_S
        self.refused = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._drain)
        self._drain()

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _drain(self) -> None:
        """The descriptor is edge-triggered, so read until nothing is left; sending may eat the next edge, hence the loop around both."""
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
        if not self._gate.admits(user, role):
            return self._refuse(frames, f"the key {user} is not known as a {role}")
        return [b"1.0", frames[1], b"200", b"OK", user.encode(), b""]

    def _refuse(self, frames: list[bytes], why: str) -> list[bytes]:
        self.refused += 1
        now = time.monotonic()
        if now - self._complained >= _COMPLAIN_S:
            self._complained = now
            address = ascii(frames[3][:64].decode("utf-8", "replace")) if len(frames) > 3 else "?"
            log.warning("refused a connection from %s: %s (%d refused so far)", address, why, self.refused)
        return [b"1.0", frames[1] if len(frames) > 1 else b"", b"400", b"refused", b"", b""]
