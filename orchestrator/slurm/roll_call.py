"""The roll call: the first node of a job and the others, over one TCP connection each that lasts as long as both live.

Owns these connections. A line is JSON behind a MAC made with the job's token, of both sides' nonces, a direction and a count, so nothing
can be forged, repeated or sent back. Must never wait without a bound. The messages are no secret; the token itself is never sent.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from orchestrator.slurm.job_preflight import JobNodeFacts
from workers.protocol.errors import EnvironmentFault

log = logging.getLogger("trireme.job")
_LINE = 1 << 16
_NONCE = 16
_POLL_S = 0.2
#: Longest that a connected peer may take for a message that is expected, seconds.
_MESSAGE_S = 10.0


class RollCallMessage(msgspec.Struct, frozen=True, kw_only=True):
    """``here``: a node with its facts and its clock, Unix seconds; ``join``: start Ray; ``joined``; ``failed`` and why; ``over``: end."""

    kind: Literal["here", "join", "joined", "failed", "over"]
    index: int = 0
    facts: JobNodeFacts | None = None
    clock: float = 0.0
    why: str = ""


class PeerLost(Exception):
    """The other side ended, or is not who it must be."""


class RollCallConnection:
    """One authenticated connection. ``leads``: this is the first node's end."""

    def __init__(self, connection: socket.socket, token: bytes, *, leads: bool) -> None:
        """Exchanges nonces. Raises :class:`PeerLost`."""
        self._socket, self._buffer = connection, bytearray()
        self._sent = self._received = 0
        self._ways = (b"lead", b"node") if leads else (b"node", b"lead")
        connection.settimeout(_MESSAGE_S)
        own = secrets.token_bytes(_NONCE)
        try:
            connection.sendall(own)
            theirs = self._exactly(_NONCE)
        except OSError as error:
            raise PeerLost(str(error)) from None
        nonces = own + theirs if leads else theirs + own
        self._key = hmac.digest(token, nonces, hashlib.sha256)

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._more()
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _more(self) -> None:
        part = self._socket.recv(4096)
        if not part:
            raise PeerLost("the connection was closed")
        self._buffer += part

    def _mac(self, way: bytes, count: int, body: bytes) -> bytes:
        return hmac.digest(self._key, way + count.to_bytes(8, "big") + body, hashlib.sha256).hex().encode()

    def send(self, message: RollCallMessage) -> None:
        """Raises :class:`PeerLost`."""
        body = msgspec.json.encode(message)
        line = self._mac(self._ways[0], self._sent, body) + b" " + body + b"\n"
        self._sent += 1
        try:
            self._socket.settimeout(_MESSAGE_S)
            self._socket.sendall(line)
        except OSError as error:
            raise PeerLost(str(error)) from None

    def receive(self, bound_s: float) -> RollCallMessage | None:
        """The next message, None when none comes within ``bound_s``. Raises :class:`PeerLost`."""
        deadline = time.monotonic() + bound_s
        try:
            while (end := self._buffer.find(b"\n")) < 0:
                if len(self._buffer) > _LINE:
                    raise PeerLost("a line is too long")
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                self._more()
        except TimeoutError:
            return None
        except OSError as error:
            raise PeerLost(str(error)) from None
        mac, _, body = bytes(self._buffer[:end]).partition(b" ")
        del self._buffer[: end + 1]
        if not hmac.compare_digest(mac, self._mac(self._ways[1], self._received, body)):
            raise PeerLost("it does not hold the job's token")
        self._received += 1
        try:
            return msgspec.json.decode(body, type=RollCallMessage)
        except msgspec.DecodeError as error:
            raise PeerLost(f"it speaks another language: {error}") from None

    def close(self) -> None:
        self._socket.close()


class RollCall:
    """The first node's side. ``check_stop`` is called while it waits, and may raise to end the wait."""

    def __init__(self, port: int, token: bytes, others: int, check_stop: Callable[[], None]) -> None:
        """Raises :class:`EnvironmentFault` where the port is taken."""
        self._token, self._others, self._check_stop = token, others, check_stop
        self._nodes: dict[int, RollCallConnection] = {}
        self.facts: dict[int, JobNodeFacts] = {}
        self._listener = socket.socket(socket.AF_INET)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind(("", port))
            self._listener.listen(others + 8)
        except OSError as error:
            self._listener.close()
            hint = "submit again: another job id has other ports"
            raise EnvironmentFault(f"port {port} of this job is taken", error.strerror or str(error), hint) from None

    def gather(self, bound_s: float) -> list[JobNodeFacts]:
        """Wait for all other nodes; their facts in order. Raises :class:`EnvironmentFault` naming the missing ones."""
        deadline = time.monotonic() + bound_s
        while len(self._nodes) < self._others:
            self._check_stop()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self._others + 1)) - self._nodes.keys())
                raise EnvironmentFault(f"nodes {missing} of the job did not answer within {bound_s:.0f} s",
                                       "their entry did not start, does not see the jobs folder, or is behind a firewall",
                                       "the job's log says what they said")  # fmt: skip
            self._admit()
        return [self.facts[index] for index in sorted(self.facts)]

    def _admit(self) -> None:
        self._listener.settimeout(_POLL_S)
        try:
            connection, address = self._listener.accept()
        except TimeoutError:
            return
        try:
            node = RollCallConnection(connection, self._token, leads=True)
            asked = time.time()
            message = node.receive(_MESSAGE_S)
        except PeerLost as error:
            connection.close()
            log.warning("turned away %s: %s", address[0], error)
            return
        if message is None or message.kind != "here" or message.facts is None or not 0 < message.index <= self._others:
            connection.close()
            return
        middle = (asked + time.time()) / 2
        self.facts[message.index] = msgspec.structs.replace(message.facts, skew_s=message.clock - middle)
        self._nodes[message.index] = node

    def join(self, bound_s: float) -> None:
        """Have all others start Ray, and wait until they have. Raises :class:`EnvironmentFault` naming the first that has not."""
        for index, connection in self._nodes.items():
            self._send(index, connection, RollCallMessage(kind="join"))
        deadline = time.monotonic() + bound_s
        for index, connection in self._nodes.items():
            node = self.facts[index].node
            while True:
                self._check_stop()
                try:
                    message = connection.receive(_POLL_S)
                except PeerLost as error:
                    raise EnvironmentFault(f"node {node} left before it had joined", str(error), "the job's log says more") from None
                if message is not None and message.kind == "joined":
                    break
                if message is not None or time.monotonic() > deadline:
                    why = message.why if message is not None else f"not within {bound_s:.0f} s"
                    raise EnvironmentFault(f"Ray does not start on node {node}", why, "its log is in the job's folder")

    def lost(self) -> list[str]:
        """Nodes that have left since the last call."""
        left = []
        for index, connection in list(self._nodes.items()):
            try:
                connection.receive(0.001)
            except PeerLost:
                left.append(self.facts[index].node)
                connection.close()
                del self._nodes[index]
        return left

    def _send(self, index: int, connection: RollCallConnection, message: RollCallMessage) -> None:
        try:
            connection.send(message)
        except PeerLost as error:
            log.warning("node %s cannot be reached: %s", self.facts[index].node, error)

    def close(self) -> None:
        """Tell the other nodes to end. A second call does nothing."""
        while self._nodes:
            index, connection = self._nodes.popitem()
            self._send(index, connection, RollCallMessage(kind="over"))
            connection.close()
        self._listener.close()


def call(address: str, port: int, token: bytes, bound_s: float) -> RollCallConnection:
    """Connect to the first node, as soon as it listens. Raises :class:`EnvironmentFault` after ``bound_s``."""
    deadline = time.monotonic() + bound_s
    while True:
        try:
            return RollCallConnection(socket.create_connection((address, port), timeout=_MESSAGE_S), token, leads=False)
        except (OSError, PeerLost) as error:
            if time.monotonic() > deadline:
                what = f"the first node of the job does not answer at {address}:{port}"
                raise EnvironmentFault(what, str(error), "look at the job's log, and at firewalls between nodes") from None
            time.sleep(_POLL_S)
