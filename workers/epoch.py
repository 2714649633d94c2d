"""Epochs: the number of one launch of a replica. The larger number is the newer launch.

epoch = Unix time of the launch in ms * 2**16 + 16 random bits, or one more than the last one known, if that is larger

The launcher knows the last epoch from the gangs that it sees, from their folders, and from the routers. It needs the last one, because a
wall clock may be set back.
"""

from __future__ import annotations

import secrets
import time

_RANDOM_BITS = 16


def make_epoch(last: int = 0) -> int:
    """The epoch of a launch that happens now; ``last``: the largest known epoch of this replica, 0 = none."""
    return max(last + 1, (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS))


def started_at(epoch: int) -> float:
    """Unix seconds of the launch, unless the clock was set back before it; 0 for a small number that was chosen by hand."""
    return (epoch >> _RANDOM_BITS) / 1000
