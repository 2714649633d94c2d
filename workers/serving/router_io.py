"""The leader's I/O thread: one DEALER socket for each router, and the heartbeats.

Owns every socket of a replica. Carries out the actions of :mod:`workers.serving.router_link`, turns frames into messages for the engine
thread and messages into frames. Must never block on a router (a send that would block means a lost router), never touch the engine or MPI,
and never deliver a frame that :mod:`workers.protocol.messages` does not accept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Protocol, TypeAlias

import msgspec
import zmq
from zmq.utils import monitor, z85

from workers import zmq_options
from workers.protocol import messages
from workers.protocol.errors import ConfigError
from workers.protocol.messages import Attach, Bye, Cancel, Credit, FromReplica, Heartbeat, Hello, RouterHeartbeat, Submit
from workers.protocol.running_clock import RunningClock
from workers.protocol.specs import RouterAddress
from workers.serving.key_sums import KeySums
from workers.serving.router_link import CloseSocket, LinkAction, OpenSocket, RouterLink, RouterLost, SendHello

#: Longest sleep of the thread, seconds, and so the longest time between two ticks of a link.
TICK_S = 0.05
#: Maximum number of routers to which one leader keeps connections.
MAX_ROUTERS = 64
#: Frames read from one router before the next one, and number of undelivered messages above which reading stops.
TURN_FRAMES, INBOX_LIMIT = 256, 4096
_WARN_S = 5.0
#: Linger time of a closing socket for the last messages (Bye, the end of requests).
_LINGER_MS = 500

log = logging.getLogger("trireme.routers")


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair in z85; ``secret`` never appears in a log."""

    public: str
    secret: str

    def __post_init__(self) -> None:
        if not (is_key(self.public) and is_key(self.secret)):
            raise ValueError("a CURVE key is not 40 characters of z85")  # the caller that reads a file adds the file's name

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


class RouterGone(msgspec.Struct, frozen=True):
    """The router with this boot nonce is lost."""

    boot: str


Event: TypeAlias = Submit | Attach | Cancel | Credit | Bye | RouterGone


class LeaderCallbacks(Protocol):
    """Callbacks of the I/O thread into the leader; they run in the I/O thread and must not block."""

    def hello(self) -> Hello: ...

    def heartbeat(self) -> Heartbeat:
        """Called every ``heartbeat_s``. Raises :class:`~workers.protocol.errors.TriremeError` if the engine thread makes no progress."""

    def deliver(self, received: float, event: Event) -> None: ...

    def backlog(self) -> int:
        """Number of delivered events that are not handled yet."""

    def on_io_error(self, error: BaseException) -> None:
        """The thread ends with ``error``; then the process must end too."""


def is_key(text: str) -> bool:
    """Whether it is a CURVE key in z85."""
    try:
        return len(text) == 40 and len(z85.decode(text.encode())) == 32
    except (ValueError, KeyError, UnicodeEncodeError):
        return False


def check_address(address: RouterAddress, keys: KeyPair | None) -> None:
    """Raises :class:`ConfigError` unless the endpoint is ``ipc://``, or ``tcp://`` with both sides' keys."""
    if address.endpoint.startswith("ipc://"):
        return
    if not address.endpoint.startswith("tcp://"):
        raise ConfigError(f"router endpoint {address.endpoint!r} is neither ipc:// nor tcp://")
    if not address.server_key or keys is None:
        missing = "the router's public key" if keys is not None else "this replica's key file"
        raise ConfigError(f"no CURVE for {address.endpoint}", f"{missing} is not given", "use ipc:// on one machine, keys elsewhere")
    if not is_key(address.server_key):
        raise ConfigError(f"the public key of {address.endpoint} is not 40 characters of z85")


class _RouterPort:
    """A router's address, its link, its socket (if open), and the routers that this router names."""

    def __init__(self, address: RouterAddress) -> None:
        self.address = address
        self.link = RouterLink()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.named: tuple[RouterAddress, ...] = ()
        self.warned_at = -_WARN_S


class RouterIo:
    """Starts with :meth:`start`; afterwards :meth:`post` and :meth:`close` may be called from the engine thread.

    Raises :class:`ConfigError` for an unsafe or invalid address.
    """

    def __init__(
        self, leader: LeaderCallbacks, addresses: tuple[RouterAddress, ...], keys: KeyPair | None, *, boot: str, heartbeat_s: float
    ) -> None:
        for address in addresses:
            check_address(address, keys)
        self._leader, self._keys, self._boot, self._heartbeat_s = leader, keys, boot, heartbeat_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._configured = addresses
        self._ports = {address.endpoint: _RouterPort(address) for address in addresses}
        self._by_boot: dict[str, _RouterPort] = {}
        self._outbox: deque[tuple[str, FromReplica]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bye_reason: str | None = None
        self._next_heartbeat = 0.0
        self._key_sums = KeySums()
        self._clock = RunningClock(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="routers", daemon=True)
        #: Frames refused since the start.
        self.malformed = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds of the clock for time-outs of peers; it stops while this process does not run."""
        return self._clock.at(time.monotonic())

    def post(self, router_boot: str, message: FromReplica) -> None:
        """Send ``message`` to the router with this boot nonce; it is dropped if that router is lost."""
        self._outbox.append((router_boot, message))
        os.eventfd_write(self._wakeup, 1)

    def close(self, reason: str, bound_s: float = 3.0) -> None:
        """Send all posted messages and Bye, and close the sockets, within ``bound_s`` seconds."""
        self._bye_reason = reason
        os.eventfd_write(self._wakeup, 1)
        self._thread.join(bound_s)
        if not self._thread.is_alive():
            os.close(self._wakeup)

    # the thread

    def _run(self) -> None:
        try:
            while self._bye_reason is None:
                self._turn()
            self._flush()
        except BaseException as error:
            self._bye_reason = str(error)
            self._leave()
            self._leader.on_io_error(error)
        else:
            self._leave()

    def _leave(self) -> None:
        bye = Bye(boot=self._boot, reason=(self._bye_reason or "")[:200])
        for port in list(self._ports.values()):
            if port.link.up:
                self._send(port, bye)
            self._drop_socket(port, linger_ms=_LINGER_MS)
        self._context.term()

    def _turn(self) -> None:
        self._clock.turn(time.monotonic())
        now = self.now
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._heartbeat_s
            message = self._leader.heartbeat()
            for port in self._ports.values():
                if port.link.up:
                    # Until the router has said who it is, its own use cannot be left out.
                    known = port.link.state == "live"
                    keys = self._key_sums.others(port.link.boot) if known else None
                    self._send(port, msgspec.structs.replace(message, keys=keys) if known else message)
            self._follow_routers()
        for port in self._ports.values():
            self._carry_out(port, port.link.tick(now))
        ready = self._poll(now)
        for port in self._ports.values():
            if port.monitor is not None and port.monitor in ready:
                self._take_monitor(port)
        if self._wakeup in ready:
            os.eventfd_read(self._wakeup)
        self._flush()
        for port in self._ports.values():
            if port.socket is not None and port.socket in ready:
                self._take_frames(port)

    def _poll(self, now: float) -> set[zmq.Socket[bytes] | int]:
        wanted: list[tuple[zmq.Socket[bytes] | int, int]] = [(self._wakeup, zmq.POLLIN)]
        reading = self._leader.backlog() < INBOX_LIMIT  # else stop reading: then the sockets' high-water marks slow the senders
        for port in self._ports.values():
            if port.monitor is not None:
                wanted.append((port.monitor, zmq.POLLIN))
            if port.socket is not None and reading:
                wanted.append((port.socket, zmq.POLLIN))
        patience = max(0.0, min(TICK_S, self._next_heartbeat - now))
        return {ready for ready, _ in zmq.zmq_poll(wanted, int(patience * 1000) + 1)}

    def _flush(self) -> None:
        while self._outbox:
            router_boot, message = self._outbox.popleft()
            port = self._by_boot.get(router_boot)
            if port is not None:
                self._send(port, message)

    def _send(self, port: _RouterPort, message: FromReplica) -> None:
        if port.socket is None:
            return
        try:
            port.socket.send(messages.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            self._carry_out(port, port.link.broken(self.now))

    def _carry_out(self, port: _RouterPort, actions: list[LinkAction]) -> None:
        for action in actions:
            match action:
                case SendHello():
                    self._send(port, self._leader.hello())
                case RouterLost(boot=boot):
                    if self._by_boot.get(boot) is port:
                        del self._by_boot[boot]
                        self._key_sums.gone(boot)
                        self._warn(port, "the router is lost")
                        self._leader.deliver(self.now, RouterGone(boot))
                case CloseSocket():
                    self._drop_socket(port, linger_ms=0)
                case OpenSocket():
                    self._connect(port)

    def _connect(self, port: _RouterPort) -> None:
        socket = port.socket = self._context.socket(zmq.DEALER)
        # Immediate: nothing is queued for an unconnected router, so a send that would block means a lost router.
        socket.immediate = True
        zmq_options.limit(socket)
        if port.address.server_key and self._keys is not None:
            zmq_options.authenticate(socket, port.address.server_key, public=self._keys.public, secret=self._keys.secret)
        port.monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(port.address.endpoint)

    def _drop_socket(self, port: _RouterPort, *, linger_ms: int) -> None:
        if port.socket is not None:
            port.socket.disable_monitor()
            port.socket.close(linger_ms)
            port.socket = port.monitor = None

    def _take_monitor(self, port: _RouterPort) -> None:
        while port.monitor is not None and port.monitor.poll(0):
            event = monitor.recv_monitor_message(port.monitor)["event"]
            now = self.now
            if event == zmq.EVENT_DISCONNECTED:
                self._carry_out(port, port.link.broken(now))
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and port.socket is not None:
                port.socket.get(zmq.EVENTS)  # makes the socket notice the new connection now; otherwise Hello could not be sent
                self._carry_out(port, port.link.connected(now))

    def _take_frames(self, port: _RouterPort) -> None:
        for _ in range(TURN_FRAMES):
            if port.socket is None:
                return
            try:
                parts = port.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            now = self.now
            try:
                if len(parts) != 1:
                    raise messages.Malformed(f"a message of {len(parts)} frames")
                message = messages.decode_to_replica(parts[0])
            except messages.Malformed as error:
                self._complain(port, str(error))
                continue
            self._take(port, message, now)

    def _take(self, port: _RouterPort, message: messages.ToReplica, now: float) -> None:
        self._carry_out(port, port.link.heard(message.boot, now))
        if port.link.state != "live":  # no message may arrive before the handshake, or without a nonce
            self._complain(port, "a message without a boot nonce")
            return
        self._by_boot[port.link.boot] = port
        if isinstance(message, RouterHeartbeat):
            port.named = tuple(address for address in message.routers if self._usable(port, address))
            if message.keys is not None:
                self._key_sums.report(port.link.boot, message.keys)
        elif isinstance(message, Bye) and message.reason != "stale":
            self._carry_out(port, port.link.broken(now))
        else:
            self._leader.deliver(now, message)

    def _complain(self, port: _RouterPort, why: str) -> None:
        self.malformed += 1
        self._warn(port, f"refused a message, {self.malformed} so far: {why!r}")

    def _warn(self, port: _RouterPort, text: str) -> None:
        """Log a line about one router, at most once in ``_WARN_S`` seconds, so that a faulty router cannot fill the disk."""
        now = time.monotonic()
        if now - port.warned_at > _WARN_S:
            port.warned_at = now
            log.warning("%s: %s", port.address.endpoint, text)

    def _follow_routers(self) -> None:
        """Keep a link to every router that the configuration or a live router names; forget a router that is down and not named."""
        wanted = {address.endpoint: address for address in self._configured}
        for port in list(self._ports.values()):
            for address in port.named if port.link.state == "live" else ():
                wanted.setdefault(address.endpoint, address)
        for endpoint, port in list(self._ports.items()):
            if endpoint not in wanted and not port.link.up:
                self._drop_socket(port, linger_ms=0)
                del self._ports[endpoint]
        for endpoint, address in wanted.items():
            if endpoint not in self._ports and len(self._ports) < MAX_ROUTERS:
                self._ports[endpoint] = _RouterPort(address)

    def _usable(self, port: _RouterPort, address: RouterAddress) -> bool:
        try:
            check_address(address, self._keys)
        except ConfigError as error:
            self._complain(port, f"a peer that cannot be used: {error}")
            return False
        return True
