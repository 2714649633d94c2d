"""The router's end of the wire to its replicas.

Owns the back socket and the heartbeat towards leaders. Turns frames into messages for the dispatcher and its messages into frames; never
decides who is believed (the fleet does, after the key's grant was checked here) and never blocks on a peer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import zmq

from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.router.net.router_socket import RouterSocket
from workers.protocol import messages
from workers.protocol.messages import FromReplica, Hello, Malformed, Peers, ToReplica
from workers.serving.router_io import KeyPair

log = logging.getLogger("trireme.replicas")


class ReplicaEvents(Protocol):
    """What the link asks of the dispatcher."""

    def hear(self, peer: bytes, user: str, message: FromReplica) -> None: ...

    def peers(self) -> list[bytes]: ...

    def unreachable(self, peer: bytes) -> None: ...


class ReplicaLink:
    """Bind ``endpoint`` and serve it from ``start``. Raises as :class:`~orchestrator.router.net.router_socket.RouterSocket`. ``malformed``:
    frames refused."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, keys: KeyPair | None, gate: CurveAcl, greeting: Peers
    ) -> None:
        self._gate = gate
        self._greeting = messages.encode(greeting)
        self._boot = greeting.boot
        self.malformed = 0
        self._port = RouterSocket(
            context, endpoint, "replica", keys=keys, gate=gate, on_frame=self._on_frame, on_malformed=self._on_malformed
        )

    @property
    def endpoint(self) -> str:
        return self._port.endpoint

    def start(self, loop: asyncio.AbstractEventLoop, ears: ReplicaEvents) -> None:
        self._ears = ears
        self._port.start(loop)

    def close(self) -> None:
        self._port.close()

    def send(self, peer: bytes, message: ToReplica) -> bool:
        return self._port.send(peer, messages.encode(message))

    def pulse(self) -> None:
        """The heartbeat: says who this router is, so that a leader notices a new one behind an old address."""
        for peer in self._ears.peers():
            if peer and not self._port.send(peer, self._greeting):
                self._ears.unreachable(peer)

    def _on_frame(self, peer: bytes, user: str, frame: bytes | memoryview) -> None:
        try:
            message = messages.decode_from_replica(frame)
        except Malformed:
            self._on_malformed(peer)
            return
        if isinstance(message, Hello):
            if user and not self._gate.may_be(user, message.replica, message.model):
                log.warning("refused a Hello for %s: its key is not granted that name or model", ascii(message.replica[:64]))
                self._port.send(peer, messages.encode(messages.Bye(boot=self._boot, reason="denied")))
                return
            log.info("hello from %s epoch %d", ascii(message.replica[:64]), message.epoch)
        self._ears.hear(peer, user, message)

    def _on_malformed(self, peer: bytes) -> None:
        self.malformed += 1
        if self.malformed == 1 or self.malformed % 1000 == 0:
            log.warning("%d malformed frames from replicas so far", self.malformed)
