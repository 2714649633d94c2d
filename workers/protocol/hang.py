"""The rule by which a step counts as hung, shared by the two places that detect a hung rank.

``Leader._check_progress`` (``workers.serving.leader``), at each heartbeat: the leader ends its replica. ``ReplicaRegistry.judge``
(``orchestrator.router.core.replica_registry``), on each heartbeat that a router gets: the replica counts as lost.
"""

from __future__ import annotations

#: A step counts as hung after this many times its predicted time.
HANG_FACTOR = 4.0


def hang_bound_ms(hang_floor_s: float, predicted_ms: float) -> float:
    """The longest time that a step may take. ``hang_floor_s``: the minimum bound, because a prediction may be far too small."""
    return max(hang_floor_s * 1000.0, HANG_FACTOR * predicted_ms)
