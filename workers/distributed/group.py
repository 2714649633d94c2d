"""Exchange of tensors between ranks: the Group protocol, the wait for a peer, and the groups that need no transport (Solo, InProcess).

Owns no tensors and decides nothing. Every call is collective or has a matching call on the peer, in the same order on every rank, because
all ranks follow the same plan. Must never import a transport, because a replica of one rank also runs without MPI
(:mod:`workers.distributed.mpi_group`).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from workers.protocol.errors import EngineFault
from workers.protocol.running_clock import RunningClock
from workers.protocol.specs import WaitPolicy

if TYPE_CHECKING:
    from workers.kernels.linear import Fp8Rows

#: Longest wait for a peer inside a step, seconds. The leader's watchdog acts much earlier; this bound is the last resort.
STEP_BOUND_S = 300.0
_SPIN_S = 0.002
_SLEEP_S = 0.0005
_IDLE_SLEEP_S = 0.005
#: After this time without an answer the peer counts as idle, not late, and the sleeps grow.
_IDLE_AFTER_S = 0.05


class Waiter:
    """Waits for a condition without keeping a shared core busy.

    ``hybrid``: test and yield for 2 ms, then sleep 0.5 ms between tests, and up to 5 ms once 50 ms have passed. ``spin``: test without a
    pause, for GPU hosts with a core for each rank.
    """

    def __init__(self, policy: WaitPolicy = "hybrid") -> None:
        self._spin = policy == "spin"

    def until(self, ready: Callable[[], bool], bound_s: float | None = STEP_BOUND_S) -> None:
        """Return when ``ready()`` is true; ``bound_s`` None = no bound (an idle rank that waits for work).

        Raises :class:`EngineFault` after ``bound_s`` seconds.
        """
        if ready():
            return
        begin = time.monotonic()
        clock = RunningClock(begin)
        pause = _SLEEP_S
        while not ready():
            now = time.monotonic()
            clock.turn(now)
            waited = clock.at(now) - begin
            if bound_s is not None and waited > bound_s:
                raise EngineFault(f"a peer rank did not answer within {bound_s:g} s", "it hangs or is gone", "the replica must be replaced")
            if self._spin:
                continue
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            time.sleep(pause)
            if waited > _IDLE_AFTER_S:
                pause = min(pause * 1.25, _IDLE_SLEEP_S)


class FusedAllReduceNorm(Protocol):
    """A sum over ranks, its addition to the residual and the norm after it, as one operation."""

    def supports(self, branch: Tensor) -> bool:
        """Whether this operation supports ``branch``."""

    def __call__(self, residual: Tensor, branch: Tensor, weight: Tensor, eps: float, *, fp8: bool) -> Tensor | Fp8Rows:
        """``residual`` [T, hidden] += sum of all ranks' ``branch`` in place; returns its norm times ``weight`` [hidden], in FP8 if
        ``fp8``."""


class Group(Protocol):
    """The protocol of a group: ``size`` ranks that exchange tensors. Tensors are contiguous; shapes and dtypes agree on all ranks. Between
    two collective calls, tensors are sent in one direction along the ranks only.

    ``deterministic``: ``all_reduce`` adds in rank order on every rank, so its bits don't depend on the transport.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def deterministic(self) -> bool: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in the memory of ``x`` or in new memory; ``x`` is invalid afterwards. Half-precision tensors are summed in
        fp32 and rounded once; only GPU transports of three or more ranks round after each addition."""

    def allreduce_norm(self, hidden: int) -> FusedAllReduceNorm | None:
        """The fused operation for rows of ``hidden`` values; None if the group has none. All ranks call this together."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], entry i from rank i."""

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """Overwrite ``x`` with the ``x`` of rank ``root``; returns ``x``."""

    def send(self, x: Tensor, to: int) -> None:
        """Start sending ``x`` to rank ``to`` and return at once. The caller may drop ``x`` but must not write to it any more."""

    def recv(self, x: Tensor, source: int) -> Tensor:
        """Fill ``x`` with the next tensor that rank ``source`` sent to this one; returns ``x``."""


def is_half(x: Tensor) -> bool:
    """Whether sums of ``x`` over ranks are taken in fp32."""
    return x.dtype in (torch.bfloat16, torch.float16)


def ordered_sum(parts: Tensor) -> Tensor:
    """Sum of ``parts`` [n, ...] over the first dimension, strictly in index order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class Solo:
    """A group of one rank."""

    rank = 0
    size = 1
    deterministic = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def allreduce_norm(self, hidden: int) -> None:
        return None

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x

    def send(self, x: Tensor, to: int) -> None:
        raise ValueError("a group of one has nobody to send to")

    def recv(self, x: Tensor, source: int) -> Tensor:
        raise ValueError("a group of one has nobody to receive from")


class _Shared:
    """The shared state of one InProcess group."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[Tensor | None] = [None] * size
        self.queues = {(a, b): queue.SimpleQueue[Tensor]() for a in range(size) for b in range(size)}


class InProcess:
    """Members of a group as threads of one process: the reference that other transports are tested against; always deterministic."""

    deterministic = True

    def __init__(self, shared: _Shared, rank: int, size: int) -> None:
        self._shared, self.rank, self.size = shared, rank, size

    @classmethod
    def create(cls, size: int) -> list[InProcess]:
        """One member for each of ``size`` threads."""
        shared = _Shared(size)
        return [cls(shared, rank, size) for rank in range(size)]

    def _exchange(self, x: Tensor) -> Tensor:
        shared = self._shared
        shared.parts[self.rank] = x
        try:
            shared.barrier.wait(STEP_BOUND_S)
            gathered = torch.stack([part for part in shared.parts if part is not None])
            # A member may overwrite its part only after all have read it.
            shared.barrier.wait(STEP_BOUND_S)
        except threading.BrokenBarrierError:
            raise EngineFault("a member of the group did not answer", "its thread ended or hangs") from None
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(ordered_sum(self._exchange(x.float() if is_half(x) else x)))

    def allreduce_norm(self, hidden: int) -> None:
        return None

    def all_gather(self, x: Tensor) -> Tensor:
        return self._exchange(x)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x.copy_(self._exchange(x)[root])

    def send(self, x: Tensor, to: int) -> None:
        self._shared.queues[self.rank, to].put(x.clone())

    def recv(self, x: Tensor, source: int) -> Tensor:
        try:
            return x.copy_(self._shared.queues[source, self.rank].get(timeout=STEP_BOUND_S))
        except queue.Empty:
            raise EngineFault("a member of the group did not send", "its thread ended or hangs") from None

    def abort(self) -> None:
        """Wake every member that waits for this one, because this member will not answer any more."""
        self._shared.barrier.abort()
