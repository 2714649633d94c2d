"""Asks routers for their status over RPC, and finds the gangs that no router can reach.

Owns the thread that asks and the latest answers. No token passes through it, and never decides about a gang.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import msgspec
import zmq

from workers import zmq_options
from workers.protocol.errors import ConfigError, EnvironmentFault, TriremeError
from workers.protocol.messages import Failed, Query, Report, decode_to_client, encode
from workers.protocol.running_clock import RunningClock
from workers.protocol.specs import RouterAddress
from workers.protocol.status import RouterStatus
from workers.serving.router_io import KeyPair

log = logging.getLogger("trireme.routers")
_ASK_EVERY_S = 0.5
_ANSWER_MS = 1000
_HINT = "trireme keys, at the routers, makes one"
#: Longer than a leader needs to find a new router.
_UNHEARD_S = 10.0
#: A replica that was lost this long ago does not return: it is longer than a leader's pause before it reconnects. A router that was frozen
#: finds its old connections dead when it continues, although its leaders live.
_RETURN_S = 1.5


class RouterPoller:
    """``targets``: the routers to ask now, by name. ``prefix``: only replicas with names that begin so are ours; it is cut off."""

    def __init__(self, targets: Callable[[], Iterable[tuple[str, RouterAddress]]], key: KeyPair, *, prefix: str = "") -> None:
        self._targets, self._key, self._prefix = targets, key, prefix
        self._latest: dict[str, tuple[float, RouterStatus]] = {}
        self._unheard: dict[tuple[str, int], float] = {}
        self._clock = RunningClock(time.monotonic(), _ASK_EVERY_S)
        self._closing = threading.Event()
        self._asking = threading.Thread(target=self._ask_all, name="router reports", daemon=True)

    def start(self) -> None:
        self._asking.start()

    def close(self) -> None:
        """Stop polling."""
        self._closing.set()

    def join(self) -> None:
        """Wait for the thread, which ends within the time-out of one answer."""
        if self._asking.is_alive():
            self._asking.join(5.0)

    def fresh(self) -> list[RouterStatus]:
        """Reports of living routers from the last seconds."""
        horizon = time.monotonic() - 4 * _ASK_EVERY_S - _ANSWER_MS / 1000
        return [report for at, report in list(self._latest.values()) if at >= horizon]

    def hung(self, ready: Iterable[tuple[str, int]], *, routers: int) -> frozenset[tuple[str, int]]:
        """Those of the ``ready`` gangs, (replica, epoch), that no router can use: :func:`given_up`, or all ``routers`` answer and none of
        them has known it for 10 s."""
        reports = self.fresh()
        known = {(replica.name, replica.epoch) for report in reports for replica in report.replicas}
        self._clock.turn(time.monotonic())
        now = self._clock.at(time.monotonic())
        # A gang may hang before its Hello, and then no router reports its loss.
        all_answer = len(reports) == routers
        self._unheard = {key: self._unheard.get(key, now) for key in ready if all_answer and key not in known}
        silent = {key for key, since in self._unheard.items() if now - since > _UNHEARD_S}
        return frozenset(silent) | given_up(reports)

    def _ask_all(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        try:
            while not self._closing.wait(_ASK_EVERY_S):
                for name, address in self._targets():
                    try:
                        report = ask(context, address, self._key)
                    except TriremeError as error:
                        log.debug("router %s: %s", name, error)
                        continue
                    if report is not None:
                        self._latest[name] = (time.monotonic(), self._ours(report))
        finally:
            context.destroy(linger=0)

    def _ours(self, report: RouterStatus) -> RouterStatus:
        if not self._prefix:
            return report
        replicas = tuple(
            msgspec.structs.replace(replica, name=replica.name.removeprefix(self._prefix))
            for replica in report.replicas
            if replica.name.startswith(self._prefix)
        )
        return msgspec.structs.replace(report, replicas=replicas)


def newest_epochs(reports: Iterable[RouterStatus]) -> dict[str, int]:
    """The largest epoch of each replica that a router knows."""
    newest: dict[str, int] = {}
    for replica in chain.from_iterable(report.replicas for report in reports):
        newest[replica.name] = max(replica.epoch, newest.get(replica.name, 0))
    return newest


def given_up(reports: Iterable[RouterStatus]) -> frozenset[tuple[str, int]]:
    """The gangs, (replica, epoch), that every router that knows them lost more than :data:`_RETURN_S` ago."""
    lost: dict[tuple[str, int], bool] = {}
    for report in reports:
        for replica in report.replicas:
            key = replica.name, replica.epoch
            lost[key] = lost.get(key, True) and replica.state == "lost" and replica.age_s > _RETURN_S
    return frozenset(key for key, is_lost in lost.items() if is_lost)


def ask(context: zmq.Context[Any], address: RouterAddress, key: KeyPair) -> RouterStatus | None:
    """One ``Query`` for ``status``; None when the router does not answer within a second. Raises as :func:`query`."""
    answer = query(context, address, key, Query(boot=secrets.token_hex(8), stream=1, what="status"))
    try:
        return msgspec.json.decode(answer.body, type=RouterStatus) if isinstance(answer, Report) else None
    except msgspec.DecodeError as error:
        raise EnvironmentFault("a router gives no status", str(error)) from None


def query(
    context: zmq.Context[Any], address: RouterAddress, key: KeyPair, message: Query, wait_ms: int = _ANSWER_MS
) -> Report | Failed | None:
    """One question to one router, and its answer; None when it does not answer within ``wait_ms``. Raises :class:`ConfigError` where the
    router does not know the key, and :class:`EnvironmentFault` where it cannot be asked."""
    socket = context.socket(zmq.DEALER)
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    try:
        zmq_options.limit(socket)
        if address.server_key:
            zmq_options.authenticate(socket, address.server_key, public=key.public, secret=key.secret)
        socket.connect(address.endpoint)
        socket.send(encode(message))
        ready = {readable for readable, _ in zmq.zmq_poll([(socket, zmq.POLLIN), (monitor, zmq.POLLIN)], wait_ms)}
        if socket not in ready:
            if monitor in ready:
                raise ConfigError(f"{address.endpoint} does not know this key", "it was never allowed there, or was taken back", _HINT)
            return None
        answer = decode_to_client(socket.recv())
        return answer if isinstance(answer, Report | Failed) else None
    except zmq.ZMQError as error:
        raise EnvironmentFault("a router cannot be asked", str(error)) from None
    finally:
        socket.disable_monitor()
        monitor.close(0)
        socket.close()
