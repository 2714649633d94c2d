"""Measured figures beside their bounds: asserted with room for a busy machine, and listed once more at the end of a test run.

Owns the list. The bounds are those of a quiet machine; a figure fails its test above :data:`SLACK` times its bound.
"""

from __future__ import annotations

#: A shared machine is slower than a quiet one, and a fault is worse than slow by more than this.
SLACK = 3.0

#: Every line so far, for the terminal (``tests/conftest.py`` prints them).
lines: list[str] = []


def figure(what: str, measured: float, bound: float, unit: str = "s") -> None:
    """Note ``measured`` beside the most that it may be. Raises AssertionError above ``SLACK`` bounds."""
    line = f"{what} {measured:.3g} {unit} / {bound:g} {unit}"
    lines.append(line + (" (over)" if measured > bound else ""))
    assert measured <= SLACK * bound, line
