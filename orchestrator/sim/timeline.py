"""The simulator's time: what is due, in order. Owns the only clock of a run; events of one instant happen in the order of planning."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Timeline:
    """Seconds from 0. A call may plan further calls, never earlier than now."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._due, (max(when, self.now), self._serial, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def run(self, until: float) -> None:
        """Everything that is due up to ``until``, which is then now."""
        due = self._due
        while due and due[0][0] <= until:
            self.now, _, call = heappop(due)
            call()
        self.now = max(self.now, until)
