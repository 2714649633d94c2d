"""One bound ROUTER socket on the event loop, for the clients or for the replicas of a router.

Owns the socket and its limits. Polls the socket's descriptor from the event loop, which costs a fraction of ``zmq.asyncio``. Knows who sent
a frame (the authenticated key on ``tcp://``) and nothing about its contents. Never waits: a send that would block has failed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket as unix
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import zmq

from orchestrator.auth.curve_acl import CurveAcl, Role
from workers import zmq_options
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.serving.router_io import KeyPair

#: Frames, and bytes, read in one turn of the event loop, before other callbacks get theirs. The last frame may go beyond the bytes.
TURN_FRAMES, TURN_BYTES = 64, 256 << 10
# Plain numbers: pyzmq's enumerations cost as much as a send each time they are combined or looked up.
_NOW, _NOW_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS, _READABLE, _MORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)

log = logging.getLogger("trireme.socket")

#: (peer, authenticated key or "", frame). The frame is valid only during the call.
OnFrame = Callable[[bytes, str, bytes | memoryview], None]


class RouterSocket:
    """Binds ``endpoint`` for peers of one ``role``. Raises ConfigError on an unsafe endpoint, EnvironmentFault on one that is in use.

    ``on_malformed(peer)`` is called for a message of more than one frame. The attribute ``endpoint`` is the address that was really bound.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        role: Role,
        *,
        keys: KeyPair | None,
        acl: CurveAcl,
        on_frame: OnFrame,
        on_malformed: Callable[[bytes], None],
    ) -> None:
        self._role, self._acl, self._on_frame, self._on_malformed = role, acl, on_frame, on_malformed
        self._secure = endpoint.startswith("tcp://")
        self._armed = False
        #: Frames of peers whose key was revoked after they connected; frames whose handling raised an error.
        self.refused = self.faults = 0
        self._socket = socket = context.socket(zmq.ROUTER)
        socket.router_mandatory = True
        zmq_options.limit(socket)
        try:
            self._bind(endpoint, keys)
        except BaseException:
            socket.close()
            raise
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _bind(self, endpoint: str, keys: KeyPair | None) -> None:
        if self._secure:
            if keys is None:
                raise ConfigError(f"no CURVE for {endpoint}", "the router has no key file", "use ipc:// on one machine, keys elsewhere")
            self._socket.curve_server = True
            self._socket.curve_secretkey, self._socket.curve_publickey = keys.secret.encode(), keys.public.encode()
            self._socket.zap_domain = self._role.encode()
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        elif endpoint.startswith("ipc://"):
            reclaim(endpoint.removeprefix("ipc://"))
        else:
            raise ConfigError(f"endpoint {endpoint!r} is neither ipc:// nor tcp://")
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            hint = "stop what holds it, or choose another" if error.errno == errno.EADDRINUSE else ""
            raise EnvironmentFault(f"cannot bind {endpoint}", str(error), hint) from None
        if not self._secure:
            os.chmod(endpoint.removeprefix("ipc://"), 0o600)

    def start(self) -> None:
        """Serve on the running event loop until :meth:`close`."""
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)
        self._arm()

    def close(self, linger_ms: int = 500) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close(linger_ms)

    def send(self, peer: bytes, frame: bytes) -> bool:
        """False: the connection is lost, or its queue has reached the high-water mark."""
        # A send may consume the event that would have made the descriptor readable: look again in the next turn.
        self._arm()
        try:
            self._socket.send(peer, _NOW_MORE)
            self._socket.send(frame, _NOW)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        """Read until nothing is left, because the descriptor is edge-triggered."""
        self._armed = False
        socket = self._socket
        if socket.closed:
            return
        left = TURN_BYTES
        for _ in range(TURN_FRAMES):
            # This is asked first because an exception for "nothing to read" costs more than a message.
            if not int(socket.get(_EVENTS)) & _READABLE:
                return
            try:
                left -= self._take(socket)
            except Exception:
                # The edge of a frame: after an error the next frame is read.
                self.faults += 1
                if self.faults == 1 or self.faults % 1000 == 0:
                    log.exception("%d frames of a %s could not be handled so far", self.faults, self._role)
            if left <= 0:
                break
        self._arm()

    def _take(self, socket: zmq.Socket[bytes]) -> int:
        """Read one whole message; returns its bytes. A ROUTER socket puts the peer's routing id before the frames that the peer sent."""
        peer = socket.recv(_NOW)
        user = ""
        content: bytes | memoryview
        if self._secure:
            frame = socket.recv(_NOW, copy=False)
            user, content = str(frame.get("User-Id")), frame.buffer
        else:
            content = socket.recv(_NOW)
        single = True
        while socket.get(_MORE):
            socket.recv(_NOW)
            single = False
        if self._secure and not self._acl.admits(user, self._role):
            self.refused += 1
        elif single:
            self._on_frame(peer, user, content)
        else:
            self._on_malformed(peer)
        return len(content)


def reclaim(path: str) -> None:
    """Prepare the path of a socket file. The folder must be open to this user only; a file that nobody listens on is removed.

    Raises ConfigError on an unsafe folder, and EnvironmentFault with the process that listens.
    """
    folder = Path(path).parent
    try:
        status = folder.stat()
    except FileNotFoundError:
        raise ConfigError(f"the folder of ipc://{path} does not exist", "", f"create {folder} with mode 0700") from None
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"the folder {folder} is open to others", "an ipc socket is guarded by its folder alone", f"chmod 700 {folder}")
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        pid = struct.unpack("iii", probe.getsockopt(unix.SOL_SOCKET, unix.SO_PEERCRED, struct.calcsize("iii")))[0]
    raise EnvironmentFault(f"ipc://{path} is taken", f"process {pid} listens on it", "stop it, or choose another path")
