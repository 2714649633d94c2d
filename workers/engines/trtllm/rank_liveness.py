"""Followers' sign of life: their main thread is inside TensorRT-LLM's C++ until the end, so a side thread speaks for the process.

Owns one tag on one communicator: every follower sends a byte to rank 0 twice a second, from a thread of its own (MPI_THREAD_MULTIPLE). A
stopped process falls silent, also while nothing is asked of it. A dead one is the launcher's to see. Must never wait for a peer.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from typing import Any

from workers.protocol.errors import EngineFault

BEAT_S = 0.5
_TAG = 7

log = logging.getLogger("trireme.trtllm")


class Beat:
    """A follower's side thread. Context manager around what the main thread does; ends within a beat."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Beat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def _run(self) -> None:
        byte = array("b", [1])
        sending = self._comm.Isend(byte, dest=0, tag=_TAG)
        while not self._over.wait(BEAT_S):
            if sending.Test():  # one beat under way at most: a leader that does not listen costs nothing
                sending = self._comm.Isend(byte, dest=0, tag=_TAG)


class Listener:
    """Rank 0's end. ``silence_s``: a follower that was not heard for so long is gone."""

    def __init__(self, comm: Any, silence_s: float) -> None:
        self._comm, self._silence_s = comm, max(silence_s, 4 * BEAT_S)
        self._heard: dict[int, float] = {}
        self._ranks: int = comm.Get_size()

    def await_all(self, deadline: float) -> None:
        """Wait for every follower's first beat. Raises :class:`EngineFault` at ``deadline`` (monotonic seconds), naming who is missing."""
        while missing := [rank for rank in range(1, self._ranks) if rank not in self._heard]:
            self._listen()
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing))
                raise EngineFault(f"rank {ranks} did not get through its start", "see its log", "or raise trtllm.start_timeout_s")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises :class:`EngineFault` naming a follower that has fallen silent."""
        self._listen()
        now = time.monotonic()
        for rank, heard in self._heard.items():
            if now - heard > self._silence_s:
                raise EngineFault(
                    f"rank {rank} has been silent for {now - heard:.1f} s", "it hangs or was stopped", "the replica is replaced whole"
                )

    def _listen(self) -> None:
        from mpi4py import MPI

        now, status, byte = time.monotonic(), MPI.Status(), array("b", [0])
        while self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=_TAG, status=status):
            source = status.Get_source()
            self._comm.Recv(byte, source=source, tag=_TAG)
            self._heard[source] = now
