"""Agreement of a world's ranks during their start: byte messages to all, and one error for all.

Owns nothing. Every rank learns of every rank's failure before any other collective, so one corrupt shard gives the same error on all ranks,
and no rank waits for a failed one. Must never import torch, which most of its users load later, and never send a Python object (mpi4py's
lower-case calls use pickle): ranks exchange bytes.

``comm`` is an MPI communicator of all ranks; None = a world of one. The wait for a rank ends with an error after ``MEET_S``.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from workers.protocol.errors import EngineFault, ErrorReport, TriremeError
from workers.protocol.running_clock import RunningClock

#: Longest that a rank waits for the others here, seconds. Other ranks may be reading weights: one host from its page cache, another over a
#: network.
MEET_S = 1800.0
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.0001, 0.005


def complete(request: Any, bound_s: float | None = MEET_S) -> None:
    """Wait for a non-blocking MPI operation without keeping a shared core busy; None = without a bound.

    Raises :class:`EngineFault` after ``bound_s`` seconds.
    """
    begin, pause = time.monotonic(), _PAUSE_MIN_S
    clock = RunningClock(begin)
    while not request.Test():
        now = time.monotonic()
        clock.turn(now)
        if bound_s is not None and clock.at(now) - begin > bound_s:
            raise EngineFault(f"a rank did not answer within {bound_s:g} s", "it hangs or is gone", "see the ranks' logs")
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_MAX_S)


def broadcast(comm: Any, data: bytes) -> bytes:
    """Rank 0's ``data`` on every rank."""
    if comm is None:
        return data
    size = array("q", [len(data)])
    complete(comm.Ibcast(size, root=0))
    buffer = bytearray(data) if comm.Get_rank() == 0 else bytearray(size[0])
    complete(comm.Ibcast(buffer, root=0))
    return bytes(buffer)


def gather(comm: Any, data: bytes) -> list[bytes]:
    """Every rank's ``data``, in rank order, on every rank."""
    if comm is None:
        return [data]
    sizes = array("q", bytes(8 * comm.Get_size()))
    complete(comm.Iallgather(array("q", [len(data)]), sizes))
    width = max(sizes)
    padded = bytearray(width * len(sizes))
    complete(comm.Iallgather(bytearray(data.ljust(width, b"\0")), padded))
    return [bytes(padded[i * width : i * width + size]) for i, size in enumerate(sizes)]


def agree(comm: Any, error: TriremeError | None) -> None:
    """Raise on every rank if any rank has an error: the rank's own error, else that of the lowest rank with an error, with its number."""
    reports = gather(comm, b"" if error is None else msgspec.json.encode(ErrorReport.of(error)))
    if error is not None:
        raise error
    for rank, data in enumerate(reports):
        if data:
            found = msgspec.json.decode(data, type=ErrorReport).error()
            found.why = f"rank {rank}: {found.why}" if found.why else f"found by rank {rank}"
            raise found


@contextmanager
def all_or_none(comm: Any) -> Iterator[None]:
    """Run a block on every rank; if it fails on any rank, raise on all, before any rank continues. See :func:`agree`."""
    failure: TriremeError | None = None
    try:
        yield
    except TriremeError as error:
        failure = error
    except (OSError, RuntimeError, MemoryError) as error:
        failure = EngineFault("a rank could not be brought up", f"{type(error).__name__}: {error}"[:300])
    agree(comm, failure)
