"""A client's sockets: one DEALER to each router, CURVE on ``tcp://``. Never blocks; knows nothing of requests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import zmq

from workers import zmq_options
from workers.protocol.errors import ConfigError
from workers.protocol.specs import RouterAddress

#: Time for the last messages (Cancel) to leave a socket that is closed.
_LINGER_MS = 100


class ClientKeys(msgspec.Struct, frozen=True, kw_only=True):
    """This client's CURVE key pair in z85, needed for ``tcp://`` routers."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"ClientKeys(public={self.public!r})"


class ClientSockets:
    """The sockets by router number. Raises ConfigError on an endpoint that cannot be used."""

    def __init__(self, routers: Sequence[RouterAddress | str], keys: ClientKeys | None) -> None:
        self._addresses = [RouterAddress(endpoint=router) if isinstance(router, str) else router for router in routers]
        if not self._addresses:
            raise ConfigError("a client needs the endpoint of a router")
        for address in self._addresses:
            if not address.endpoint.startswith(("ipc://", "tcp://")):
                raise ConfigError(f"router endpoint {address.endpoint!r} is neither ipc:// nor tcp://")
            if address.endpoint.startswith("tcp://") and (keys is None or not address.server_key):
                raise ConfigError(f"no CURVE for {address.endpoint}", "it needs the router's public key and this client's key pair")
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = [self._connect(address) for address in self._addresses]

    def __len__(self) -> int:
        return len(self._addresses)

    def reset(self, router: int) -> None:
        """Drop the connection and its queued frames, and open a new one."""
        self.sockets[router].close(0)
        self.sockets[router] = self._connect(self._addresses[router])

    def send(self, router: int, frame: bytes) -> bool:
        """False: the high-water mark is reached, because this router does not read."""
        try:
            self.sockets[router].send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self, router: int) -> bytes | None:
        """The next frame; None = no frame has arrived."""
        try:
            return self.sockets[router].recv(zmq.DONTWAIT)
        except zmq.Again:
            return None

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(_LINGER_MS)
        self._context.term()

    def _connect(self, address: RouterAddress) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        zmq_options.limit(socket)
        if address.endpoint.startswith("tcp://"):
            assert self._keys is not None
            zmq_options.authenticate(socket, address.server_key, public=self._keys.public, secret=self._keys.secret)
        socket.connect(address.endpoint)
        return socket
