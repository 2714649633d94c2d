"""Liveness of followers. Their main thread is inside TensorRT-LLM's C++ until the end, so a side thread shows that the process runs.

Owns one tag on one communicator: every follower sends a byte to rank 0 twice a second, from a thread of its own (MPI_THREAD_MULTIPLE). A
stopped process falls silent, also while the replica is idle. The launcher sees a dead one. Must never wait for a peer.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from typing import Any

from workers.protocol.errors import EngineFault
from workers.protocol.running_clock import RunningClock

#: Time between two signs of life, seconds.
PERIOD_S = 0.5
_TAG = 7

log = logging.getLogger("trireme.trtllm")


class LivenessSender:
    """A follower's side thread. Context manager around what the main thread does; ends within ``PERIOD_S``."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def __enter__(self) -> LivenessSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * PERIOD_S)

    def _run(self) -> None:
        byte = array("b", [1])
        sending = self._comm.Isend(byte, dest=0, tag=_TAG)
        while not self._ended.wait(PERIOD_S):
            if sending.Test():  # at most one is under way: a leader that does not receive them costs nothing
                sending = self._comm.Isend(byte, dest=0, tag=_TAG)


class LivenessMonitor:
    """Rank 0's end. ``silence_s``: a follower that has sent nothing for so long is gone."""

    def __init__(self, comm: Any, silence_s: float) -> None:
        self._comm, self._silence_s = comm, max(silence_s, 4 * PERIOD_S)
        # Rank 0 looks at each poll of its engine, and twice a second while that is idle.
        self._clock = RunningClock(time.monotonic(), 2 * PERIOD_S)
        self._last_seen: dict[int, float] = {}
        self._ranks: int = comm.Get_size()

    def await_all(self, deadline: float) -> None:
        """Wait for every follower's first sign of life. Raises :class:`EngineFault` at ``deadline`` (monotonic seconds), naming the ranks
        that are missing."""
        while missing := [rank for rank in range(1, self._ranks) if rank not in self._last_seen]:
            self._receive()
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing))
                raise EngineFault(f"rank {ranks} did not get through its start", "see its log", "or raise trtllm.start_timeout_s")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises :class:`EngineFault` naming a follower that has fallen silent."""
        now = self._receive()
        for rank, seen in self._last_seen.items():
            if now - seen > self._silence_s:
                raise EngineFault(
                    f"rank {rank} has been silent for {now - seen:.1f} s", "it hangs or was stopped", "the replica is replaced whole"
                )

    def _receive(self) -> float:
        """Take what has come; returns the time, in which a freeze of this process does not count."""
        from mpi4py import MPI

        self._clock.turn(time.monotonic())
        now, status, byte = self._clock.at(time.monotonic()), MPI.Status(), array("b", [0])
        while self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=_TAG, status=status):
            source = status.Get_source()
            self._comm.Recv(byte, source=source, tag=_TAG)
            self._last_seen[source] = now
        return now
