"""Measured figures with their bounds: asserted with a margin for a busy machine, and listed at the end of a test run.

Owns the list. The bounds are those of a quiet machine; a figure fails its test above :data:`SLACK` times its bound. A time that is measured
beside other tests says little of what was tested: there its bound grows by :func:`crowd`.
"""

from __future__ import annotations

import os

#: A shared machine is slower than a quiet one, and a fault is worse than slow by more than this.
SLACK = 3.0

#: Every line so far, for the terminal (``tests/conftest.py`` prints them).
lines: list[str] = []


def crowd() -> float:
    """How many times longer than alone something may take now: tests beside this one, or tasks a core, and at least 1."""
    cores = len(os.sched_getaffinity(0))
    return max(1.0, float(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), os.getloadavg()[0] / cores)


def figure(what: str, measured: float, bound: float, unit: str = "s") -> None:
    """Note ``measured`` beside the most that it may be. Raises AssertionError above ``SLACK`` bounds, for a time times ``crowd()``."""
    line = f"{what} {measured:.3g} {unit} / {bound:g} {unit}"
    lines.append(line + (" (over)" if measured > bound else ""))
    assert measured <= SLACK * bound * (crowd() if unit in ("s", "ms") else 1.0), line
