"""Options of the ZeroMQ sockets between processes: queue limits, time-outs for silent peers, and keys. Owns no socket."""

from __future__ import annotations

from typing import Any

import zmq

from workers.protocol.messages import HIGH_WATER, MAX_FRAME

#: Longest from a connection to the end of its handshake, milliseconds: CURVE needs a few, more on a busy host. A peer that connects but
#: sends nothing must not occupy a connection.
HANDSHAKE_MS = 3000
#: Silence before a ping, and silence after which a connection is closed, milliseconds. ZeroMQ's own thread answers, so a busy process is
#: not mistaken for a dead one.
PING_MS, SILENCE_MS = 500, 1500
#: First and longest pause before a reconnect, milliseconds: leaders find a restarted router within a second.
RECONNECT_MS, RECONNECT_MAX_MS = 100, 1000


def limit(socket: zmq.Socket[Any]) -> None:
    """Bound the socket's queues and waits. Closing it drops unsent messages, unless ``close`` gets a linger time."""
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = HIGH_WATER
    socket.maxmsgsize = MAX_FRAME
    socket.handshake_ivl = HANDSHAKE_MS
    socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = PING_MS, SILENCE_MS, SILENCE_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT_MS, RECONNECT_MAX_MS


def authenticate(socket: zmq.Socket[Any], server_key: str, *, public: str, secret: str) -> None:
    """Use CURVE towards the server with this public key; ``public`` and ``secret`` are the socket's own pair. All in z85."""
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey, socket.curve_secretkey = public.encode(), secret.encode()
