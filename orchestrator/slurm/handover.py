"""When a job lets go: the one decision of a hand-over at the time limit. Pure; time is an argument.

serving → limit near (its successor is submitted) → draining. A job that was told to drain does so at once; one whose time limit is near
serves on until its successor is ready, but not so long that Slurm would end it in the middle of its drain.
"""

from __future__ import annotations

import msgspec

#: Between the end of a drain and the time limit: farewells, kills and their proof, seconds.
MARGIN_S = 20.0


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """What the job sees. ``limit_since``: when Slurm's signal came, on the clock of ``now``; ``lead_s``: at least this long from then
    to the time limit, 0 = no hand-over; ``grace_s``: bound of a drain. Seconds."""

    now: float
    told_to_drain: bool
    limit_since: float | None
    successor_ready: bool
    lead_s: float
    grace_s: float


def least_lead(grace_s: float) -> float:
    """The least lead that leaves time for a drain, seconds."""
    return grace_s + MARGIN_S


def why_drain(sight: Sight) -> str:
    """The reason to drain now; empty = go on serving."""
    if sight.told_to_drain:
        return "told to drain"
    if sight.limit_since is None:
        return ""
    if sight.lead_s <= 0:
        return "the time limit is near"
    if sight.successor_ready:
        return "the successor is ready"
    if sight.now >= sight.limit_since + sight.lead_s - least_lead(sight.grace_s):
        return "the time limit is near and the successor is not ready"
    return ""
