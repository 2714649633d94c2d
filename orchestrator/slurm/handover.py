"""When a job drains its deployment: the one decision of a hand-over at the time limit. Pure; time is an argument.

serving → limit near (its successor is submitted) → draining. A job drains at once when it gets the order. One whose time limit is near
serves on until its successor is ready, but not so long that Slurm would end it in the middle of its drain.
"""

from __future__ import annotations

import msgspec

#: Between the end of a drain and the time limit: time for the last messages, and for killing what is left, seconds.
MARGIN_S = 20.0


class HandoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the job knows now. ``limit_since``: when Slurm's signal came, on the clock of ``now``; ``lead_s``: at least this long from then
    to the time limit, 0 = no hand-over; ``grace_s``: bound of a drain. Seconds."""

    now: float
    drain_ordered: bool
    limit_since: float | None
    successor_ready: bool
    lead_s: float
    grace_s: float


def least_lead(grace_s: float) -> float:
    """The least lead that leaves time for a drain, seconds."""
    return grace_s + MARGIN_S


def drain_reason(facts: HandoverFacts) -> str:
    """The reason to drain now; empty = go on serving."""
    if facts.drain_ordered:
        return "ordered to drain"
    if facts.limit_since is None:
        return ""
    if facts.lead_s <= 0:
        return "the time limit is near"
    if facts.successor_ready:
        return "the successor is ready"
    if facts.now >= facts.limit_since + facts.lead_s - least_lead(facts.grace_s):
        return "the time limit is near and the successor is not ready"
    return ""
