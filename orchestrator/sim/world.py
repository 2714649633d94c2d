"""One run: the deployment of a schedule, its requests and faults, until every client has its answer and no state is left.

Owns everything of the run. Raises AssertionError if a guarantee is broken, also by the core's own checks.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random

import msgspec

from orchestrator.sim.schedule import (
    HORIZON_S,
    Arrive,
    Crash,
    CutConnection,
    DrainReplica,
    Event,
    Freeze,
    Hang,
    KillReplica,
    Leave,
    Lie,
    LoseTokens,
    Schedule,
    Slow,
    StopRouter,
    Usurp,
    Wander,
)
from orchestrator.sim.sim_client import SimClient
from orchestrator.sim.sim_network import SimNetwork
from orchestrator.sim.sim_replica import SimReplica
from orchestrator.sim.sim_router import SimRouter
from orchestrator.sim.timeline import Timeline

#: Time by which all requests must have ended, and time after it by which no state may be left. Seconds.
LIMIT_S, SETTLE_S = 90.0, 8.0
#: Time between two checks of all state.
LOOK_S = 0.5


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """``ends``: clients by how they ended; ``counts``: the routers' totals; ``seconds``: simulated."""

    ends: dict[str, int]
    counts: dict[str, int]
    tokens: int
    gangs: int
    seconds: float


class World:
    """``run`` once. Implements the gangs' Host: whoever is gone is launched again. ``window_events``: as :class:`SimRouter` takes it."""

    def __init__(self, schedule: Schedule, *, window_events: int = 0) -> None:
        self._schedule = schedule
        setup = schedule.setup
        self._timeline, self._chance = Timeline(), Random(setup.noise)
        self._net = SimNetwork(self._timeline, self._chance, setup.repeats)
        self.routers = [SimRouter(index, self._timeline, setup.max_queue, window_events) for index in range(setup.routers)]
        self.clients: dict[int, SimClient] = {}
        self._gangs: list[SimReplica] = []
        self._epoch = 0

    def run(self) -> Outcome:
        """Raises AssertionError when a promise is broken."""
        timeline = self._timeline
        for router in self.routers:
            router.start()
        self._gangs = [self._launch(index) for index in range(self._schedule.setup.replicas)]
        for event in self._schedule.events:
            timeline.at(event.at, partial(self._apply, event))
        last = max((event.at for event in self._schedule.events), default=0.0)
        while timeline.now < max(last, HORIZON_S) or not all(client.over for client in self.clients.values()):
            assert timeline.now < LIMIT_S, f"not ended: requests {[id for id, client in self.clients.items() if not client.over]}"
            self._look(timeline.now + LOOK_S)
        ended = timeline.now
        while timeline.now < ended + SETTLE_S:
            self._look(timeline.now + LOOK_S)
        for gang in self._gangs:
            gang.check_idle()
        for router in self.routers:
            assert router.up, f"router{router.index} did not come back"
            router.check_idle()
            router.crash()  # adds up its counts
        counts = Counter[str]()
        for router in self.routers:
            counts.update(router.counts)
        return Outcome(
            ends=dict(Counter(client.outcome for client in self.clients.values())), counts=dict(counts),
            tokens=sum(client.tokens for client in self.clients.values()), gangs=self._epoch, seconds=ended,
        )  # fmt: skip

    def _look(self, until: float) -> None:
        self._timeline.run(until)
        for gang in self._gangs:
            gang.check()
        for router in self.routers:
            if router.up:
                router.core.check()

    def _launch(self, index: int) -> SimReplica:
        self._epoch += 1
        gang = SimReplica(index, self._epoch, self._schedule.setup, timeline=self._timeline, net=self._net, routers=self.routers, host=self)
        gang.start()
        return gang

    def ended(self, gang: SimReplica, why: str) -> None:
        """Called by every gang at its end; one that a newer epoch took the place of has no successor."""
        if self._gangs[gang.index] is gang:
            self._timeline.after(self._chance.uniform(0.3, 1.5), partial(self._replace, gang))

    def _replace(self, gang: SimReplica) -> None:
        if self._gangs[gang.index] is gang:
            self._gangs[gang.index] = self._launch(gang.index)

    def _usurp(self, old: SimReplica) -> None:
        self._gangs[old.index] = self._launch(old.index)
        self._timeline.after(self._chance.uniform(0.5, 3.0), lambda: old.die("a newer epoch lives"))

    def _apply(self, event: Event) -> None:
        match event:
            case Arrive():
                self.clients[event.id] = client = SimClient(event, self._timeline, self.routers)
                client.ask()
            case Leave(id=id, choice=choice):
                if id in self.clients:
                    self.clients[id].leave(choice)
            case Wander(id=id):
                if id in self.clients:
                    self.clients[id].wander()
            case CutConnection(gang=gang, router=router, seconds=seconds):
                self._net.cut((gang, router), seconds)
            case LoseTokens(gang=gang, router=router):
                self._net.losing.add((gang, router))
            case Crash(router=router, seconds=seconds):
                self.routers[router].crash()
                self._restart(router, seconds)
            case StopRouter(router=router, grace_s=grace_s, seconds=seconds):
                self.routers[router].close(grace_s)
                self._restart(router, grace_s + seconds)
            case _:
                self._disturb(self._gangs[event.gang], event)

    def _restart(self, router: int, seconds: float) -> None:
        def start() -> None:
            if not self.routers[router].up:
                self.routers[router].start()

        self._timeline.after(seconds, start)

    def _disturb(self, gang: SimReplica, event: KillReplica | Freeze | Hang | Slow | Lie | DrainReplica | Usurp) -> None:
        match event:
            case KillReplica():
                gang.die("killed", flush=self._chance.random() < 0.5)
            case Freeze(seconds=seconds):
                gang.freeze(seconds)
            case Hang():
                gang.hang()
            case Slow(seconds=seconds):
                gang.slow(seconds)
            case Lie(kind=kind):
                gang.lie(kind)
            case DrainReplica(grace_s=grace_s):
                gang.drain(grace_s)
            case Usurp():
                self._usurp(gang)
