"""Epochs: the number of one launch of a replica. The larger number is the newer launch, also across hosts whose clocks agree.

epoch = Unix time of the launch in ms * 2**16 + 16 random bits
"""

from __future__ import annotations

import secrets
import time

_RANDOM_BITS = 16


def make_epoch() -> int:
    """The epoch of a launch that happens now."""
    return (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)


def started_at(epoch: int) -> float:
    """Unix seconds of the launch; 0 for a small number that somebody chose by hand."""
    return (epoch >> _RANDOM_BITS) / 1000
