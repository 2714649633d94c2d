"""The control loop: observe gangs, reconcile with what is wanted, act through a launcher. It runs in ``trireme up`` or in a Ray actor.

Owns the wanted gangs and the reconciler. Never on the token path: its death stops no gang, and a new one adopts what lives.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from orchestrator.control.launch.launcher import GangSpec, Launcher, write_private
from orchestrator.control.reconciler import DrainGang, KillGang, LaunchGang, Reconciler, ReplicaView, RestartPolicy, WantedReplica
from workers.protocol.errors import TriremeError

log = logging.getLogger("trireme.controller")
TICK_S = 0.2

#: (replica, epoch) of gangs that the routers lost although they look alive.
Hung: TypeAlias = Iterable[tuple[str, int]]


class Controller:
    """One deployment's loop, driven from outside: ``tick`` is one round. Thread-safe."""

    def __init__(self, launcher: Launcher, policy: RestartPolicy) -> None:
        self._launcher = launcher
        self._reconciler = Reconciler(policy)
        self._specs: dict[str, GangSpec] = {}
        self._lock = threading.Lock()
        self._views: list[ReplicaView] = []

    def apply(self, gangs: Sequence[GangSpec]) -> None:
        """What is wanted from now on; an empty sequence drains everything."""
        with self._lock:
            self._specs = {spec.replica.name: spec for spec in gangs}

    def drain(self, replica: str) -> bool:
        """Replace one replica gracefully; False when it does not run."""
        with self._lock:
            return self._reconciler.drain(replica)

    def tick(self, hung: Hung = ()) -> None:
        """Observe, reconcile, act: milliseconds, but for the removal of a gang, which is bounded by seconds."""
        with self._lock:
            wanted = [WantedReplica(name=name, revision=spec.revision) for name, spec in self._specs.items()]
            actions = self._reconciler.step(time.time(), wanted, self._launcher.poll(), frozenset(hung))
            self._views = self._reconciler.views()
            for action in actions:
                self._act(action)

    def _act(self, action: LaunchGang | DrainGang | KillGang) -> None:
        match action:
            case LaunchGang(name):
                log.info("replica %s: launching", name)
                self._launcher.start(self._specs[name])
            case DrainGang(name, epoch):
                log.info("replica %s epoch %d: draining", name, epoch)
                self._launcher.drain(name, epoch)
            case KillGang(name, epoch, reason):
                log.warning("replica %s epoch %d: removing: %s", name, epoch, reason)
                self._launcher.kill(name, epoch)

    def abort(self, bound_s: float = 10.0) -> None:
        """Nothing is wanted any more, and nothing is waited for but the proof that it is gone."""
        deadline = time.monotonic() + bound_s
        with self._lock:
            self._specs = {}
            while (gangs := self._launcher.poll()) and time.monotonic() < deadline:
                for gang in gangs:
                    self._launcher.kill(gang.name, gang.epoch)
                time.sleep(TICK_S / 4)
            self._reconciler.step(time.time(), [], gangs, frozenset())
            self._views = self._reconciler.views()

    def views(self) -> list[ReplicaView]:
        """The table of the last round."""
        return self._views

    def end_with_host(self) -> None:
        """Gangs of this process end with it."""

    def close(self) -> None:
        self._launcher.close()


class ControllerActor:
    """The loop inside a Ray actor. The wanted gangs lie in ``target`` (0600), so that Ray may restart the actor with the same arguments.

    ``end``: ends this actor for good.
    """

    def __init__(self, target: str, policy: bytes, make_launcher: Callable[[], Launcher], end: Callable[[], None]) -> None:
        self._target, self._end = Path(target), end
        self._controller = Controller(make_launcher(), msgspec.json.decode(policy, type=RestartPolicy))
        self._hung: frozenset[tuple[str, int]] = frozenset()
        self.apply()
        threading.Thread(target=self._loop, name="control loop", daemon=True).start()

    def apply(self) -> bytes:
        """Read the wanted gangs again; returns the table after one round with them."""
        self._controller.apply(msgspec.json.decode(self._target.read_bytes(), type=list[GangSpec]))
        self._controller.tick(self._hung)
        return msgspec.json.encode(self._controller.views())

    def drain(self, replica: str) -> bool:
        return self._controller.drain(replica)

    def abort(self) -> None:
        self._controller.abort()

    def end_with(self, pid: int) -> None:
        """The host, process ``pid`` of this node, is ending. If it is killed before all is gone, this actor finishes it and ends."""
        threading.Thread(target=self._inherit, args=(os.pidfd_open(pid),), name="last will", daemon=True).start()

    def _inherit(self, host: int) -> None:
        select.select([host], [], [])
        log.warning("the host was killed while it ended: ending its gangs")
        write_private(self._target, b"[]")
        self.apply()
        while self._target.read_bytes() == b"[]":  # else a new host has taken over
            if not self._controller.views():
                self._end()
                return
            time.sleep(TICK_S)

    def report(self, hung: list[tuple[str, int]]) -> bytes:
        """Tell what the routers lost; returns the table of replicas as JSON."""
        self._hung = frozenset((name, epoch) for name, epoch in hung)
        return msgspec.json.encode(self._controller.views())

    def _loop(self) -> None:
        while True:
            try:
                self._controller.tick(self._hung)
            except TriremeError as error:
                log.error("control loop: %s", error)
            except Exception:
                # The edge of a task: whatever Ray raises while its own control plane is away, the next round tries again.
                log.exception("control loop")
            time.sleep(TICK_S)
