"""The control loop: observe gangs, compare them with the wanted ones, act through a launcher. It runs in ``trireme up`` or in a Ray actor.

Owns the wanted gangs and the reconciler. Never on the token path: its death stops no gang, and a new controller adopts the living ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from orchestrator.control.launch.launcher import GangSpec, Launcher, last_epoch
from orchestrator.control.reconciler import DrainGang, KillGang, LaunchGang, Reconciler, ReplicaView, RestartPolicy, WantedReplica
from workers.protocol.running_clock import RunningClock

log = logging.getLogger("trireme.controller")
TICK_S = 0.2
#: Longest plausible round of a loop that removes gangs, seconds; after a longer one the loop was frozen meanwhile.
LONGEST_ROUND_S = 5.0

#: (replica, epoch) of gangs that the routers lost although they look alive.
Hung: TypeAlias = Iterable[tuple[str, int]]
#: The largest epoch of each replica that a router knows.
Epochs: TypeAlias = Mapping[str, int]
NO_EPOCHS: Epochs = {}


class Controller:
    """One deployment's loop, driven from outside: ``tick`` is one round. Thread-safe."""

    def __init__(self, launcher: Launcher, policy: RestartPolicy) -> None:
        self._launcher = launcher
        self._reconciler = Reconciler(policy)
        self._specs: dict[str, GangSpec] = {}
        self._lock = threading.Lock()
        self._views: list[ReplicaView] = []
        self._clock = RunningClock(time.monotonic(), LONGEST_ROUND_S)
        #: Difference between Unix and monotonic time at the start: a wall clock that is set back later must not prolong a back-off.
        self._since_1970 = time.time() - time.monotonic()
        #: The largest epoch of each replica that was ever seen here or at a router.
        self._last_epochs: dict[str, int] = {}

    def apply(self, gangs: Sequence[GangSpec]) -> None:
        """Set the wanted gangs; an empty sequence drains everything."""
        with self._lock:
            self._specs = {spec.replica.name: spec for spec in gangs}

    def drain(self, replica: str) -> bool:
        """Replace one replica gracefully; False when it does not run."""
        with self._lock:
            return self._reconciler.drain(replica)

    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None:
        """Observe, compare, act. Takes milliseconds, except for the removal of a gang, which takes at most some seconds. ``epochs``: the
        largest epochs that routers know; the next launch of a replica gets a larger one."""
        with self._lock:
            self._reconciler.postpone(self._clock.turn(time.monotonic()))
            wanted = [WantedReplica(name=name, revision=spec.revision) for name, spec in self._specs.items()]
            gangs = self._launcher.poll()
            for name, epoch in (*epochs.items(), *((gang.name, gang.epoch) for gang in gangs)):
                self._last_epochs[name] = max(epoch, self._last_epochs.get(name, 0))
            actions = self._reconciler.step(self._now(), wanted, gangs, frozenset(hung))
            self._views = self._reconciler.views()
            for action in actions:
                self._act(action)

    def _act(self, action: LaunchGang | DrainGang | KillGang) -> None:
        match action:
            case LaunchGang(name, restarts):
                log.info("replica %s: launching", name)
                spec = self._specs[name]
                last = max(self._last_epochs.get(name, 0), last_epoch(spec))
                self._launcher.start(msgspec.structs.replace(spec, restarts=restarts, last_epoch=last))
            case DrainGang(name, epoch):
                log.info("replica %s epoch %d: draining", name, epoch)
                self._launcher.drain(name, epoch)
            case KillGang(name, epoch, reason):
                log.warning("replica %s epoch %d: removing: %s", name, epoch, reason)
                self._launcher.kill(name, epoch)

    def abort(self, bound_s: float = 10.0) -> None:
        """Kill every gang without a grace, and wait until none is left, at most ``bound_s`` seconds."""
        deadline = time.monotonic() + bound_s
        with self._lock:
            self._specs = {}
            while (gangs := self._launcher.poll()) and time.monotonic() < deadline:
                for gang in gangs:
                    self._launcher.kill(gang.name, gang.epoch)
                time.sleep(TICK_S / 4)
            self._reconciler.step(self._now(), [], gangs, frozenset())
            self._views = self._reconciler.views()

    def _now(self) -> float:
        """Unix seconds by a monotonic clock."""
        return self._since_1970 + time.monotonic()

    def views(self) -> list[ReplicaView]:
        """The table of the last round."""
        return self._views

    def end_with_host(self) -> None:
        """Gangs of this process end with it."""

    def close(self) -> None:
        self._launcher.close()
