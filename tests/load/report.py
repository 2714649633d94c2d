"""Figures of a load or soak run: a line each, measured / bound, and the exit code that they come to. Owns the verdicts."""

from __future__ import annotations

import sys


class Report:
    """``failed`` once a bound that must hold did not."""

    def __init__(self) -> None:
        self.failed = False

    def at_most(self, what: str, measured: float, bound: float, unit: str = "", *, slack: float = 1.0) -> None:
        """``slack``: how many times the bound is a failure; the strict one is told as missed."""
        self._tell(what, measured, bound, unit, held=measured <= bound, broken=measured > slack * bound)

    def at_least(self, what: str, measured: float, bound: float, unit: str = "", *, slack: float = 1.0) -> None:
        self._tell(what, measured, bound, unit, held=measured >= bound, broken=measured < bound / slack)

    def _tell(self, what: str, measured: float, bound: float, unit: str, *, held: bool, broken: bool) -> None:
        self.failed |= broken
        verdict = "" if held else "  FAILED" if broken else "  missed"
        say(f"{what} {measured:.6g} / {bound:.6g} {unit}".rstrip() + verdict)


def say(text: str) -> None:
    print(text, flush=True)
    sys.stdout.flush()


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
