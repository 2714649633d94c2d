"""The groups and the device of one rank.

Owns the split of the world: MPI carries messages between ranks on every device, and tensors on CPUs; NCCL carries tensors on GPUs.
Must never pickle: ranks exchange tensors and bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from workers.distributed.agreement import all_or_none
from workers.distributed.group import Group, Solo
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.specs import GPU_MIN_CAPABILITY, EngineSpec, Parallel, ReplicaSpec

if TYPE_CHECKING:
    from mpi4py import MPI

    from workers.distributed.nccl_group import NcclWorld


class RankGroups(msgspec.Struct, frozen=True, kw_only=True):
    """The groups that one rank uses in a step. ``tensor``: the tp ranks of its stage; ``pipeline``: the stages of its tp rank;
    ``token_return``: the same stages with a separate communicator, for the tokens that the last stage returns to the first, because these
    must not wait behind hidden states. By default a world of one rank."""

    tensor: Group = msgspec.field(default_factory=Solo)
    pipeline: Group = msgspec.field(default_factory=Solo)
    token_return: Group = msgspec.field(default_factory=Solo)


class RankContext(msgspec.Struct, frozen=True, kw_only=True):
    """The device and the groups of one rank. ``world``: all ranks, for bytes on the host; ``host_ranks``: number of ranks on its host;
    ``nccl``: its membership of NCCL, which it leaves at the end."""

    world: Group
    groups: RankGroups
    comm: MPI.Intracomm | None = None
    host_ranks: int = 1
    device: torch.device = torch.device("cpu")
    nccl: NcclWorld | None = None


def split(spec: ReplicaSpec, comm: MPI.Intracomm | None) -> RankContext:
    """Split the world into groups and choose this rank's device. ``comm`` None = a world of one rank.

    Raises, on every rank the same:
        EnvironmentFault: the world has not tp * pp ranks.
        ConfigError: there is no GPU for each of them.
    """
    size = 1 if comm is None else comm.Get_size()
    parallel = spec.parallel
    if size != parallel.world:
        raise EnvironmentFault(
            f"tp={parallel.tp} pp={parallel.pp} needs {parallel.world} ranks, the world has {size}",
            "mpiexec was started with another count",
            f"use mpiexec -n {parallel.world}",
        )
    if comm is None:
        device = torch.device("cpu") if spec.engine.device == "cpu" else choose_gpu(spec.engine, 0, 1)
        return RankContext(world=Solo(), groups=RankGroups(), device=device)
    from mpi4py import MPI

    from workers.distributed.mpi_group import MpiGroup

    rank, wait = comm.Get_rank(), spec.engine.wait
    # The bits of a transport's own sum may depend on the message's size, and so on the rest of the batch.
    ordered = spec.engine.deterministic or spec.engine.fixed_shape
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    world = MpiGroup(comm.Dup(), wait=wait)
    if spec.engine.device == "cuda":
        return _split_gpus(spec, comm, world, host, ordered)
    pipeline = MpiGroup(comm.Split(parallel.tp_rank(rank), rank), wait=wait)
    tensor = MpiGroup(comm.Split(parallel.pp_rank(rank), rank), deterministic=ordered, wait=wait)
    groups = RankGroups(tensor=tensor, pipeline=pipeline, token_return=pipeline)
    return RankContext(world=world, groups=groups, comm=comm, host_ranks=host.Get_size())


def choose_gpu(engine: EngineSpec, host_rank: int, host_ranks: int) -> torch.device:
    """Choose the GPU of this rank, make it the current one and return it.

    The launcher shows a gang its GPUs (``CUDA_VISIBLE_DEVICES``): one for each of its ``host_ranks`` ranks on this host, in their order.

    Raises:
        ConfigError: too few GPUs, a GPU that is too old, or an engine option that GPUs do not support. Another launch would fail in the
        same way.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < host_ranks:
        seen = f"{count} GPUs are visible" if count else "no GPU is visible, or torch is a build without CUDA"
        raise ConfigError(
            f"device cuda needs a GPU for each of the {host_ranks} ranks on this host",
            seen,
            "use --device cpu, fewer ranks, or show the replica more GPUs (CUDA_VISIBLE_DEVICES)",
        )
    if engine.fixed_shape:
        raise ConfigError("fixed_shape is not possible on a GPU", "its matrix products choose their order by the batch", "use device: cpu")
    torch.cuda.set_device(host_rank)
    device = torch.device("cuda", host_rank)
    capability = torch.cuda.get_device_capability(device)
    if capability < GPU_MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{name} is too old", f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed", "use --device cpu")
    return device


def _split_gpus(spec: ReplicaSpec, comm: MPI.Intracomm, world: Group, host: MPI.Comm, ordered: bool) -> RankContext:
    parallel, rank, host_rank, count = spec.parallel, comm.Get_rank(), host.Get_rank(), host.Get_size()
    with all_or_none(comm):
        device = choose_gpu(spec.engine, host_rank, count)
        # Memory that all members map requires direct access between their GPUs.
        direct = all(torch.cuda.can_device_access_peer(host_rank, other) for other in range(count) if other != host_rank)
    # Triton is imported only after every rank has a GPU, because machines without a GPU may have no Triton.
    from workers.distributed.nccl_group import TWO_SHOT_BYTES, NcclWorld

    all_direct = int(world.all_gather(torch.tensor([direct and count == comm.Get_size()], dtype=torch.int64)).min())
    with all_or_none(comm):
        nccl = NcclWorld.join(comm, device, one_host=count == comm.Get_size())
        stages = [[stage * parallel.tp + tp for tp in range(parallel.tp)] for stage in range(parallel.pp)]
        pipelines = [[stage * parallel.tp + tp for stage in range(parallel.pp)] for tp in range(parallel.tp)]
        groups = RankGroups(
            tensor=nccl.group(stages, deterministic=ordered, symmetric_bytes=TWO_SHOT_BYTES * all_direct) if parallel.tp > 1 else Solo(),
            pipeline=nccl.group(pipelines) if parallel.pp > 1 else Solo(),
            token_return=nccl.group(pipelines) if parallel.pp > 1 else Solo(),
        )
        _connect(groups, device, parallel, rank)
    return RankContext(world=world, groups=groups, comm=comm, host_ranks=count, device=device, nccl=nccl)


def _connect(groups: RankGroups, device: torch.device, parallel: Parallel, rank: int) -> None:
    """Use every connection once: NCCL opens a connection at its first use, and no step should wait for this."""
    token = torch.zeros(4, device=device)
    groups.tensor.all_reduce(token.clone())
    if parallel.pp == 1:
        return
    stage, last = parallel.pp_rank(rank), parallel.pp - 1
    if stage > 0:
        groups.pipeline.recv(token, stage - 1)
    if stage < last:
        groups.pipeline.send(token.clone(), stage + 1)
    if stage == 0:
        groups.token_return.recv(token, last)
    if stage == last:
        groups.token_return.send(token.clone(), 0)
    torch.cuda.synchronize(device)
