"""Wanted replicas + observed gangs + time -> actions. Pure: time is an argument, nothing is random, nothing waits.

Owns the facts that must outlive a gang: how often a replica failed, when it may be launched again, whether it has failed permanently. The
state of a gang comes only from the launcher's reports; so a restarted controller creates a new reconciler, which sees the living gangs and
adopts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from workers.protocol.messages import Capacity
from workers.protocol.status import GangPhase, ReplicaPhase

ENDED = ("stopped", "failed")


class GangStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One gang as its launcher sees it. ``since``: Unix seconds at which ``phase`` began; ``pids``: (rank, host, pid).

    ``permanent``: the failure will repeat on every launch (a wrong configuration or a broken artifact); ``exit_code``: its class, as
    :mod:`workers.protocol.errors` numbers them, 0 = not known. ``restarts``: the value in its :class:`LaunchGang`.
    """

    name: str
    epoch: int
    revision: str
    phase: GangPhase
    since: float = 0.0
    pids: tuple[tuple[int, str, int], ...] = ()
    hosts: tuple[str, ...] = ()
    capacity: Capacity | None = None
    cause: str = ""
    hint: str = ""
    permanent: bool = False
    exit_code: int = 0
    log_dir: str = ""
    restarts: int = 0


class WantedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that should run. Another ``revision`` under the same name means: drain the old gang, then launch the new one."""

    name: str
    revision: str


class LaunchGang(msgspec.Struct, frozen=True):
    """``restarts``: number of gangs of this replica and revision, including this one, that were launched because another had failed. The
    gang carries it, so that a new controller knows it."""

    name: str
    restarts: int = 0


class DrainGang(msgspec.Struct, frozen=True):
    name: str
    epoch: int


class KillGang(msgspec.Struct, frozen=True):
    """End the whole gang and forget it; also removes remaining processes of a gang that ended by itself."""

    name: str
    epoch: int
    reason: str


Action: TypeAlias = LaunchGang | DrainGang | KillGang


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds, seconds. A gang that was ready for ``stable_s`` clears its replica's failures; ``max_failures`` in a row end it."""

    backoff_s: float = 1.0
    backoff_max_s: float = 30.0
    max_failures: int = 8
    stable_s: float = 60.0
    start_timeout_s: float = 600.0
    drain_grace_s: float = 30.0


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica for a status table. ``failures``: failures in a row; ``restarts``: all launches after a failure; ``due``: time of the
    next launch, 0 = not waiting."""

    name: str
    phase: ReplicaPhase
    since: float
    epoch: int = 0
    failures: int = 0
    restarts: int = 0
    due: float = 0.0
    cause: str = ""
    hint: str = ""
    exit_code: int = 0
    gang: GangStatus | None = None


class _Replica(msgspec.Struct, kw_only=True):
    revision: str
    since: float
    failures: int = 0
    restarts: int = 0
    lost: bool = False  # after a failure, until it is launched again
    due: float = 0.0
    dead: bool = False
    cause: str = ""
    hint: str = ""
    exit_code: int = 0
    epoch: int = 0
    begun: float = 0.0
    ready_since: float = 0.0
    killing: int = 0


class Reconciler:
    """The controller's memory. ``step`` is called with all observed gangs; its actions are carried out before the next call."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self._replicas: dict[str, _Replica] = {}
        self._draining: dict[tuple[str, int], float] = {}
        self._gangs: dict[str, GangStatus] = {}
        self._drain_asked: set[tuple[str, int]] = set()

    def drain(self, name: str) -> bool:
        """Replace one replica's gang: it drains, and its successor is launched after its end. False if it has no living gang."""
        gang = self._gangs.get(name)
        if gang is None or gang.phase in ENDED:
            return False
        self._drain_asked.add((name, gang.epoch))
        return True

    def postpone(self, seconds: float) -> None:
        """The controller was frozen for ``seconds``: they do not count as time of a gang's start or drain."""
        for replica in self._replicas.values():
            replica.begun += seconds
        self._draining = {key: at + seconds for key, at in self._draining.items()}

    def step(
        self, now: float, wanted: Sequence[WantedReplica], gangs: Iterable[GangStatus], hung: frozenset[tuple[str, int]]
    ) -> list[Action]:
        """Actions in the order in which they are to be done. ``hung``: (name, epoch) of ready gangs that the routers lost."""
        names = {want.name: want for want in wanted}
        for name in [name for name in self._replicas if name not in names]:
            del self._replicas[name]
        actions: list[Action] = []
        newest: dict[str, GangStatus] = {}
        observed = sorted(gangs, key=lambda gang: gang.epoch)
        for gang in observed:
            newest[gang.name] = gang
        for gang in observed:
            if newest[gang.name] is not gang:
                actions.append(KillGang(gang.name, gang.epoch, "a newer epoch of this replica exists"))
        self._gangs = newest
        for name, gang in newest.items():
            if name not in names:
                actions += self._retire(now, gang, "not wanted any more")
        for want in wanted:
            actions += self._replica(now, want, newest.get(want.name), hung)
        present = {(gang.name, gang.epoch) for gang in observed}
        self._draining = {key: at for key, at in self._draining.items() if key in present}
        self._drain_asked &= present
        return actions

    def _replica(self, now: float, want: WantedReplica, gang: GangStatus | None, hung: frozenset[tuple[str, int]]) -> list[Action]:
        replica = self._replicas.get(want.name)
        if replica is None or replica.revision != want.revision:
            replica = self._replicas[want.name] = _Replica(revision=want.revision, since=now)
        if gang is None:
            if replica.dead or now < replica.due:
                return []
            replica.restarts += replica.lost
            replica.lost = False
            return [LaunchGang(want.name, replica.restarts)]
        if gang.epoch != replica.epoch:
            replica.epoch, replica.begun, replica.ready_since = gang.epoch, now, 0.0
        if gang.revision == want.revision:
            replica.restarts = max(replica.restarts, gang.restarts)  # larger where an earlier controller launched it
        if gang.phase == "placing":
            replica.begun = now  # the wait for room is not part of a start: a cluster may take an hour to grow
        if gang.revision != want.revision:
            return self._retire(now, gang, "its configuration changed")
        if (gang.name, gang.epoch) in self._drain_asked or (gang.name, gang.epoch) in self._draining:
            # Also if it is wanted again: a drain cannot be revoked.
            return self._retire(now, gang, "it was ordered to drain")
        if gang.phase in ENDED:
            self._record(now, replica, gang.cause or "it stopped by itself", gang.hint, gang.exit_code, permanent=gang.permanent)
            return [KillGang(gang.name, gang.epoch, gang.cause or "it stopped by itself")]
        if gang.phase == "ready" and not replica.ready_since:
            replica.ready_since = now
        if replica.ready_since and now - replica.ready_since >= self.policy.stable_s:
            replica.failures, replica.cause, replica.hint = 0, "", ""
        return self._unhealthy(now, replica, gang, hung)

    def _unhealthy(self, now: float, replica: _Replica, gang: GangStatus, hung: frozenset[tuple[str, int]]) -> list[Action]:
        reason = ""
        if (gang.name, gang.epoch) in hung and gang.phase == "ready":
            reason = "hung: no progress within its bound"
        elif gang.phase in ("starting", "loading") and now - replica.begun > self.policy.start_timeout_s:
            reason = f"not ready within {self.policy.start_timeout_s:.0f} s"
        if not reason:
            return []
        self._record(now, replica, reason, "", 0, permanent=False)
        return [KillGang(gang.name, gang.epoch, reason)]

    def _record(self, now: float, replica: _Replica, cause: str, hint: str, exit_code: int, *, permanent: bool) -> None:
        """Count the end of one gang, once, however long its removal takes."""
        if replica.killing == replica.epoch:
            return
        replica.killing, replica.lost = replica.epoch, True
        was_ready = replica.ready_since > 0
        if was_ready and now - replica.ready_since >= self.policy.stable_s:
            replica.failures = 0
        replica.failures += 1
        replica.cause, replica.hint, replica.exit_code, replica.since = cause, hint, exit_code, now
        replica.dead = permanent or replica.failures >= self.policy.max_failures
        replica.due = now + self.delay(replica.failures, was_ready=was_ready)

    def delay(self, failures: int, *, was_ready: bool) -> float:
        """Seconds before the next launch: 0 after the first loss of a gang that had served, else 1, 2, 4 ... 30."""
        if was_ready and failures == 1:
            return 0.0
        return float(min(self.policy.backoff_max_s, self.policy.backoff_s * 2 ** min(failures - 1, 16)))

    def _retire(self, now: float, gang: GangStatus, reason: str) -> list[Action]:
        """Drain first; kill what still runs one second after the grace."""
        if gang.phase in ENDED or gang.phase in ("placing", "starting", "loading"):
            return [KillGang(gang.name, gang.epoch, reason)]
        begun = self._draining.setdefault((gang.name, gang.epoch), now)
        if now - begun > self.policy.drain_grace_s + 1.0:
            return [
                KillGang(gang.name, gang.epoch, f"{reason}; still running {self.policy.drain_grace_s:.0f} s after it was ordered to drain")
            ]
        return [DrainGang(gang.name, gang.epoch)] if begun == now else []

    def views(self) -> list[ReplicaView]:
        """Every wanted replica, then every gang that is being ended."""
        rows = [self._view(name, replica, self._gangs.get(name)) for name, replica in self._replicas.items()]
        leaving = [gang for name, gang in self._gangs.items() if name not in self._replicas]
        return rows + [
            ReplicaView(name=g.name, phase=g.phase if g.phase in ENDED else "draining", since=g.since, epoch=g.epoch, gang=g)
            for g in leaving
        ]

    def _view(self, name: str, replica: _Replica, gang: GangStatus | None) -> ReplicaView:
        phase: ReplicaPhase
        since, due = replica.since, 0.0
        if gang is not None and gang.phase not in ENDED:
            phase, since = ("draining" if (gang.name, gang.epoch) in self._draining else gang.phase), gang.since
        elif replica.dead:
            phase = "failed"
        elif replica.failures:
            phase, due = "backoff", replica.due
        else:
            phase = "pending"
        return ReplicaView(
            name=name,
            phase=phase,
            since=since,
            epoch=replica.epoch,
            failures=replica.failures,
            restarts=replica.restarts,
            due=due,
            cause=replica.cause,
            hint=replica.hint,
            exit_code=replica.exit_code,
            gang=gang,
        )
