"""The router's connection to its replicas.

Owns the back socket and the heartbeat to leaders. Turns frames into messages for the dispatcher, and the dispatcher's messages into frames.
Checks that a key allows the replica and model of its Hello; the replica registry decides everything else. Never blocks on a peer.
"""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec
import zmq

from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.router.net.router_socket import RouterSocket
from workers.protocol import messages
from workers.protocol.messages import FromReplica, Hello, KeyUse, Malformed, RouterHeartbeat, ToReplica
from workers.serving.router_io import KeyPair

log = logging.getLogger("trireme.replicas")


class ReplicaEvents(Protocol):
    """The receiver of what happens at the replicas: the dispatcher."""

    def hear(self, peer: bytes, user: str, message: FromReplica, frame: bytes) -> None: ...

    def peers(self) -> list[bytes]: ...

    def unreachable(self, peer: bytes) -> None: ...


class ReplicaLink:
    """Binds ``endpoint``, and serves it after :meth:`start`. Raises as :class:`~orchestrator.router.net.router_socket.RouterSocket`.
    ``malformed``: refused frames."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        keys: KeyPair | None,
        acl: CurveAcl,
        greeting: RouterHeartbeat,
        events: ReplicaEvents,
    ) -> None:
        self._acl, self._events = acl, events
        self._greeting = greeting
        self._boot = greeting.boot
        self.malformed = 0
        self._socket = RouterSocket(
            context, endpoint, "replica", keys=keys, acl=acl, on_frame=self._on_frame, on_malformed=self._on_malformed
        )

    @property
    def endpoint(self) -> str:
        return self._socket.endpoint

    def start(self) -> None:
        self._socket.start()

    def close(self) -> None:
        self._socket.close()

    def send(self, peer: bytes, message: ToReplica) -> bool:
        """False: the connection is lost, or cannot accept the message."""
        return self._socket.send(peer, messages.encode(message))

    def pulse(self, keys: list[KeyUse]) -> None:
        """Send the heartbeat. It names this router process, so that a leader notices a new one at an old address. ``keys``: what this
        router takes for API keys."""
        frame = messages.encode(msgspec.structs.replace(self._greeting, keys=keys))
        for peer in self._events.peers():
            if peer and not self._socket.send(peer, frame):
                self._events.unreachable(peer)

    def _on_frame(self, peer: bytes, user: str, frame: bytes | memoryview) -> None:
        try:
            message = messages.decode_from_replica(frame)
        except Malformed:
            self._on_malformed(peer)
            return
        if isinstance(message, Hello):
            if user and not self._acl.may_be(user, message.replica, message.model):
                log.warning("refused a Hello for %s: its key is not granted that name or model", ascii(message.replica[:64]))
                self._socket.send(peer, messages.encode(messages.Bye(boot=self._boot, reason="denied")))
                return
            log.info("hello from %s epoch %d", ascii(message.replica[:64]), message.epoch)
        self._events.hear(peer, user, message, bytes(frame))

    def _on_malformed(self, peer: bytes) -> None:
        self.malformed += 1
        if self.malformed == 1 or self.malformed % 1000 == 0:
            log.warning("%d malformed frames from replicas so far", self.malformed)
