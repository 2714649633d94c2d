"""Connections between gangs and routers: ordered, delayed, sometimes with repeated messages, and lost when one side or the network fails.

Owns the messages in flight. As with ZeroMQ, a router learns of a lost connection by a send that fails, a gang by an event of its socket,
and neither what had arrived before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Protocol

from orchestrator.sim.timeline import Timeline
from workers.protocol.messages import Credit, FromReplica, Hello, Tokens, ToReplica

#: Silence on a connection after which both ends drop it, as ZMTP heartbeats do; pause between two attempts to connect. Seconds.
PULSE_S, RETRY_S = 1.5, 0.1


class SimReplicaEnd(Protocol):
    """A gang's end."""

    def connected(self, connection: SimConnection) -> None: ...

    def broken(self, connection: SimConnection) -> None: ...

    def take(self, connection: SimConnection, message: ToReplica) -> None: ...


class SimRouterEnd(Protocol):
    """A router's end. ``connections``: its connections by peer, as its socket knows them."""

    up: bool
    connections: dict[bytes, SimConnection]

    def hear(self, peer: bytes, message: FromReplica) -> None: ...


class SimNetwork:
    """All connections. ``repeats``: the share of messages that come twice."""

    def __init__(self, timeline: Timeline, chance: Random, repeats: float) -> None:
        self.timeline, self.chance, self.repeats = timeline, chance, repeats
        self._healed_at: dict[tuple[int, int], float] = {}
        self._connections: dict[tuple[int, int], list[SimConnection]] = {}
        self.losing: set[tuple[int, int]] = set()
        self._serial = 0

    def connect(self, pair: tuple[int, int], near: SimReplicaEnd, far: SimRouterEnd) -> SimConnection:
        """A connection of the (gang, router) ``pair`` that is being opened."""
        self._serial += 1
        connection = SimConnection(self, pair, f"peer{self._serial}".encode(), near, far)
        connections = self._connections.setdefault(pair, [])
        connections[:] = [*(old for old in connections if not old.closed), connection]
        self.timeline.after(self.delay(), connection.establish)
        return connection

    def delay(self) -> float:
        """The delay of one message: about a millisecond, sometimes much longer."""
        return self.chance.uniform(0.1, 0.4) if self.chance.random() < 0.01 else self.chance.uniform(0.0005, 0.003)

    def cut(self, pair: tuple[int, int], seconds: float) -> None:
        self._healed_at[pair] = max(self.healed_at(pair), self.timeline.now + seconds)
        self.timeline.after(PULSE_S, partial(self._give_up, pair))

    def healed_at(self, pair: tuple[int, int]) -> float:
        return self._healed_at.get(pair, 0.0)

    def _give_up(self, pair: tuple[int, int]) -> None:
        if self.healed_at(pair) > self.timeline.now:
            for connection in list(self._connections.get(pair, ())):
                connection.sever()


class SimConnection:
    """One connection. ``closed``: nothing more is sent on it; what is under way still arrives unless it was severed."""

    def __init__(self, net: SimNetwork, pair: tuple[int, int], peer: bytes, near: SimReplicaEnd, far: SimRouterEnd) -> None:
        self._net, self.pair, self.peer, self._near, self._far = net, pair, peer, near, far
        self.closed = False
        self._up = self._severed = False
        self._arrived_at = {True: 0.0, False: 0.0}

    def establish(self) -> None:
        """The handshake, tried until the other end is there."""
        if self.closed:
            return
        if not self._far.up or self._net.healed_at(self.pair) > self._net.timeline.now:
            self._net.timeline.after(RETRY_S, self.establish)
            return
        self._up = True
        self._far.connections[self.peer] = self
        self._near.connected(self)

    def to_router(self, message: FromReplica) -> bool:
        """False: there is no connection to send it on."""
        if self.closed or not self._up:
            return False
        if isinstance(message, Tokens) and self.pair in self._net.losing:
            self._net.losing.discard(self.pair)
            return True
        self._send(partial(self._far.hear, self.peer, message), up=True, again=not isinstance(message, Hello))
        return True

    def to_replica(self, message: ToReplica) -> bool:
        """False: the connection is gone."""
        if self.closed:
            return False
        self._send(partial(self._near.take, self, message), up=False, again=not isinstance(message, Credit))
        return True

    def _send(self, arrive: Callable[[], None], *, up: bool, again: bool) -> None:
        net = self._net
        at = self._arrived_at[up] = max(self._arrived_at[up], net.timeline.now + net.delay())
        net.timeline.at(at, partial(self._pass, arrive))
        if again and net.repeats and net.chance.random() < net.repeats:
            # A stale copy may come to a router at any time; what starts sequences is repeated at once or not at all.
            net.timeline.at(at + (net.chance.uniform(0.0, 1.0) if up else 0.0), partial(self._pass, arrive))

    def _pass(self, arrive: Callable[[], None]) -> None:
        if self._severed:
            return
        healed_at = self._net.healed_at(self.pair)
        if healed_at > self._net.timeline.now:
            self._net.timeline.at(healed_at, partial(self._pass, arrive))
        else:
            arrive()

    def close(self, *, flush: bool) -> None:
        """The gang's end is closed; ``flush``: what was sent still arrives."""
        self.closed = True
        self._severed = not flush
        self._far.connections.pop(self.peer, None)

    def sever(self) -> None:
        """The connection is lost, with all that was under way, and the gang learns of it."""
        if not self.closed:
            self.close(flush=False)
            self._near.broken(self)
