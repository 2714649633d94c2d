"""The clock of whoever judges silence: it counts only time in which the judge itself ran.

Every wait that ends in "the other one is dead" measures its bound with it. When a host is frozen (SIGSTOP of all processes, a paused
virtual machine) and goes on, its judges wake up together with those whom they judge, and nobody could be heard meanwhile: the time of
the freeze proves nothing about anybody.

Pure: times are arguments, seconds of one clock that never goes back.
"""

from __future__ import annotations

#: The longest time between two turns that counts, seconds. Judges turn more often; one that turns later did not run meanwhile.
LONGEST_TURN_S = 0.25


class RunningClock:
    """Follows a clock, but a gap between two turns counts as ``longest_s`` at most.

    The judge calls :meth:`turn` in each round of its loop. Other threads may call :meth:`at` at any time.
    """

    __slots__ = ("_longest_s", "_mark")

    def __init__(self, now: float, longest_s: float = LONGEST_TURN_S) -> None:
        self._longest_s = longest_s
        #: When the last turn began, by the clock that is followed and by this one. It is replaced whole.
        self._mark = (now, now)

    def at(self, now: float) -> float:
        """The time of this clock: not later than ``longest_s`` after the last turn."""
        turned, ran = self._mark
        gap = now - turned
        if gap <= 0.0:
            return ran
        return ran + (gap if gap < self._longest_s else self._longest_s)

    def turn(self, now: float) -> float:
        """The judge runs now. Returns the seconds since its last turn that do not count."""
        turned, ran = self._mark
        counted = min(max(0.0, now - turned), self._longest_s)
        self._mark = (max(now, turned), ran + counted)
        return max(0.0, now - turned) - counted
