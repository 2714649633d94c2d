"""A clock for time-outs of peers: it counts only time in which its owner itself ran.

Every time-out after which a peer counts as dead is measured with it. When a host is frozen (SIGSTOP of all processes, a paused virtual
machine) and continues, a waiting process and its peers wake up together. No peer could send anything meanwhile, so the time of the freeze
proves nothing.

Pure: times are arguments, seconds of one clock that never goes back.
"""

from __future__ import annotations

#: The longest time between two turns that counts, seconds. Owners call ``turn`` more often; after a longer gap the owner did not run
#: meanwhile.
LONGEST_TURN_S = 0.25


class RunningClock:
    """Follows a clock, but a gap between two turns counts as ``longest_s`` at most.

    The owner calls :meth:`turn` in each round of its loop. Other threads may call :meth:`at` at any time.
    """

    __slots__ = ("_longest_s", "_mark")

    def __init__(self, now: float, longest_s: float = LONGEST_TURN_S) -> None:
        self._longest_s = longest_s
        #: The start of the last turn, by the followed clock and by this one. The pair is replaced atomically.
        self._mark = (now, now)

    def at(self, now: float) -> float:
        """The time of this clock: not later than ``longest_s`` after the last turn."""
        turned, ran = self._mark
        gap = now - turned
        if gap <= 0.0:
            return ran
        return ran + (gap if gap < self._longest_s else self._longest_s)

    def turn(self, now: float) -> float:
        """The owner runs now. Returns the seconds since its last turn that do not count."""
        turned, ran = self._mark
        counted = min(max(0.0, now - turned), self._longest_s)
        self._mark = (max(now, turned), ran + counted)
        return max(0.0, now - turned) - counted
