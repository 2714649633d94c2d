"""Requests of one API key at several routers in simulated time: limiters and leaders' sums of the product, with heartbeats between."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from random import Random

from orchestrator.auth.api_keys import KeyLimits
from orchestrator.router.key_limits import KeyLimiter
from workers.protocol.errors import RateLimited
from workers.serving.key_sums import KeySums


class KeyTraffic:
    """``routers`` and ``leaders`` that tell each other the use of the key every ``heartbeat_s``, each at a phase of its own."""

    def __init__(self, routers: int, *, leaders: int, limits: KeyLimits, heartbeat_s: float, seed: int) -> None:
        self._limits, self._heartbeat_s = limits, heartbeat_s
        self._chance, self._numbers, self.now = Random(seed), count(), 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.limiters = [KeyLimiter() for _ in range(routers)]
        self.leaders: list[KeySums] = []
        for index in range(routers):
            self._at(self._chance.uniform(0, heartbeat_s), lambda index=index: self._router_beat(index))  # type: ignore[misc]
        for _ in range(leaders):
            self.add_leader()

    def add_leader(self) -> None:
        number = len(self.leaders)
        self.leaders.append(KeySums())
        self._at(self.now + self._chance.uniform(0, self._heartbeat_s), lambda: self._leader_beat(number))

    def run(self, *, seconds: float, rate: float, tokens: int, lasts_s: float) -> list[float]:
        """Ask ``rate`` times a second for ``tokens``, all of which are used ``lasts_s`` later. Returns when requests were admitted."""
        end, admitted = self.now + seconds, list[float]()

        def ask() -> None:
            limiter = self._chance.choice(self.limiters)
            try:
                limiter.check("k", "t", self._limits, self.now)
                held = limiter.admit("k", tokens, self.now)
            except RateLimited:
                pass
            else:
                admitted.append(self.now)
                self._at(self.now + lasts_s, lambda: limiter.settle(held, 0, tokens, self.now))
            if self.now + 1 / rate < end:
                self._at(self.now + 1 / rate, ask)

        self._at(self.now + 1 / rate, ask)
        while self._due and self._due[0][0] <= end:
            self.now, _, act = heapq.heappop(self._due)
            act()
        self.now = end
        return admitted

    def _at(self, moment: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (moment, next(self._numbers), act))

    def _router_beat(self, index: int) -> None:
        uses = self.limiters[index].report(self.now)
        for leader in self.leaders:
            leader.report(f"router{index}", uses)
        self._at(self.now + self._heartbeat_s, lambda: self._router_beat(index))

    def _leader_beat(self, number: int) -> None:
        for index, limiter in enumerate(self.limiters):
            limiter.hear(f"leader{number}", self.leaders[number].others(f"router{index}"), self.now)
        self._at(self.now + self._heartbeat_s, lambda: self._leader_beat(number))
