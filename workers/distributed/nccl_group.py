"""Ranks with a GPU each: tensors between the members of a group over NCCL, small sums over symmetric memory.

Owns the process groups of a rank: joining and leaving them. MPI starts the ranks and carries their messages; no call here makes the host
wait. Must never use NVLink multicast. A rank must not leave before the graphs that captured operations of its groups are deleted.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from workers.distributed.allreduce_norm import AllReduceNorm
from workers.distributed.group import STEP_BOUND_S, is_half, ordered_sum
from workers.distributed.one_shot_allreduce import OneShotAllReduce

if TYPE_CHECKING:
    from mpi4py import MPI

#: Largest sums, bytes, for one shot (every rank sends all its data to all others), by the number of ranks; and for two shots (the ranks
#: divide the work). Measured inside a graph on two and four H200: `python -m bench.collectives`.
ONE_SHOT_BYTES = {2: 2 << 20}
ONE_SHOT_MANY = 256 << 10
TWO_SHOT_BYTES = 8 << 20
_SUMMED = (torch.bfloat16, torch.float32)
_TIMEOUT = timedelta(seconds=STEP_BOUND_S)


class NcclGroup:
    """A group of ranks with a GPU each. Every call is put into the current stream and returns at once.

    ``symmetric_bytes``: the largest sums that use memory which all members map; 0 if their GPUs cannot access each other directly.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, deterministic: bool = False, symmetric_bytes: int = 0) -> None:
        self._group, self._device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.deterministic = deterministic
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._shared: Tensor | None = None
        self._one_shot: OneShotAllReduce | None = None
        if symmetric_bytes and self.size > 1 and not deterministic:
            self._one_shot = OneShotAllReduce(group, device, ONE_SHOT_BYTES.get(self.size, ONE_SHOT_MANY))
            self._shared = symmetric.empty(symmetric_bytes, dtype=torch.uint8, device=device)
            symmetric.rendezvous(self._shared, group=group.group_name)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        if self.deterministic:
            return x.copy_(ordered_sum(self.all_gather(x.float() if is_half(x) else x)))
        if self._one_shot is not None and self._one_shot.supports(x):
            return self._one_shot(x)
        nbytes = x.numel() * x.element_size()
        # Each rank's share of a sum must be a multiple of 16 bytes, because a thread moves 16 bytes at once.
        if self._shared is not None and nbytes <= len(self._shared) and nbytes % (16 * self.size) == 0 and x.dtype in _SUMMED:
            mine = self._shared[:nbytes].view(x.dtype).view(x.shape)
            mine.copy_(x)
            torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._group.group_name, x)
            return x
        dist.all_reduce(x, group=self._group)
        return x

    def allreduce_norm(self, hidden: int) -> AllReduceNorm | None:
        return None if self._one_shot is None or hidden % 2 else AllReduceNorm(self._group, self._device, hidden)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self._group)
        return gathered

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        dist.broadcast(x, group_src=root, group=self._group)
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        work = dist.isend(x, group_dst=to, group=self._group)
        assert work is not None
        self._sending.append((work, x))

    def recv(self, x: Tensor, source: int) -> Tensor:
        work = dist.irecv(x, group_src=source, group=self._group)
        assert work is not None
        work.wait()
        return x


class NcclWorld:
    """This rank's membership of NCCL, from :meth:`join` to :meth:`leave`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def join(cls, comm: MPI.Intracomm, device: torch.device, *, one_host: bool) -> NcclWorld:
        """Join the other ranks of ``comm`` through a store that rank 0 opens; MPI broadcasts its address. ``one_host``: all ranks are on
        this host; else the other hosts must be able to resolve this host's name."""
        rank, size = comm.Get_rank(), comm.Get_size()
        host = "127.0.0.1" if one_host else socket.gethostname()
        store = None
        if rank == 0:
            store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        address = bytearray(256)
        if store is not None:
            text = f"{host}:{store.port}".encode()
            address[: len(text)] = text
        comm.Bcast(address, root=0)
        if store is None:
            host, _, port = address.rstrip(b"\0").decode().rpartition(":")
            store = TCPStore(host, int(port), size, is_master=False, timeout=_TIMEOUT)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=_TIMEOUT, device_id=device)
        return cls(device)

    def group(self, every: Sequence[Sequence[int]], *, deterministic: bool = False, symmetric_bytes: int = 0) -> NcclGroup:
        """This rank's group among ``every`` list of world ranks. All ranks call this together, with the same ``every``."""
        mine: dist.ProcessGroup | None = None
        for ranks in every:
            made = dist.new_group(list(ranks), timeout=_TIMEOUT, device_id=self._device)
            if dist.get_rank() in ranks:
                mine = made
        if mine is None:
            raise ValueError("this rank is in none of the groups")
        return NcclGroup(mine, self._device, deterministic=deterministic, symmetric_bytes=symmetric_bytes)

    def leave(self) -> None:
        """Leave NCCL: after the captured graphs are deleted, before MPI is finalized."""
        torch.cuda.synchronize(self._device)
        dist.destroy_process_group()
