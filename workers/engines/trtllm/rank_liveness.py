"""Liveness of followers. Their main thread is inside TensorRT-LLM's C++ code until the end, so a second thread shows that the process runs.

Owns one tag on one communicator: every follower sends a byte to rank 0 twice a second, from a separate thread (MPI_THREAD_MULTIPLE). A
stopped process is silent, also while the replica is idle. The launcher detects a dead process. Must never wait for a peer.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from typing import Any

from workers.protocol.errors import EngineFault
from workers.protocol.running_clock import RunningClock

#: Time between two bytes, seconds.
PERIOD_S = 0.5
_TAG = 7

log = logging.getLogger("trireme.trtllm")


class LivenessSender:
    """A follower's second thread. A context manager around the work of the main thread; ends within ``PERIOD_S``."""

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
            if sending.Test():  # at most one send is pending, so a leader that does not receive costs nothing
                sending = self._comm.Isend(byte, dest=0, tag=_TAG)


class LivenessMonitor:
    """Rank 0's side. ``silence_s``: a follower that has sent nothing for this time counts as gone."""

    def __init__(self, comm: Any, silence_s: float) -> None:
        self._comm, self._silence_s = comm, max(silence_s, 4 * PERIOD_S)
        # Rank 0 checks at each poll of its engine, and twice a second while the engine is idle.
        self._clock = RunningClock(time.monotonic(), 2 * PERIOD_S)
        self._last_seen: dict[int, float] = {}
        self._ranks: int = comm.Get_size()

    def await_all(self, deadline: float) -> None:
        """Wait for every follower's first byte. Raises :class:`EngineFault` at ``deadline`` (monotonic seconds), naming the ranks that are
        missing."""
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
        """Receive pending bytes; returns the time of a clock that does not count a freeze of this process."""
        from mpi4py import MPI

        self._clock.turn(time.monotonic())
        now, status, byte = self._clock.at(time.monotonic()), MPI.Status(), array("b", [0])
        while self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=_TAG, status=status):
            source = status.Get_source()
            self._comm.Recv(byte, source=source, tag=_TAG)
            self._last_seen[source] = now
        return now
