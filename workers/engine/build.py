"""Brings up one rank: probes the CPU, splits the world into groups, loads the shard, sizes the cache.

Owns nothing afterwards. Every rank learns of every rank's failure before any other collective, so that one corrupt shard gives the same
clean error everywhere and no rank waits for one that has given up. Must never pickle: what ranks exchange is msgpack in tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from workers.artifacts.artifact import Artifact, open_artifact
from workers.core.shard import Shard, shard_of
from workers.engine.cache import KvCache, agree, blocks_that_fit
from workers.engine.comm import Group, Solo
from workers.engine.runner import Runner
from workers.engine.weights import fill, load_shards
from workers.errors import ConfigError, EngineFault, EnvironmentFault, TriremeError, from_code
from workers.model.llama import LlamaStage
from workers.spec import EngineSpec, ReplicaSpec
from workers.wire import Capacity

if TYPE_CHECKING:
    from mpi4py import MPI

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Bytes of a rank's status report: 800 characters and their framing, however they are encoded.
_REPORT = 4096


class Ranks(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of one rank: all of the world, the tp ranks of its stage, the stages of its tp rank; ``host_ranks`` share its memory."""

    world: Group
    tensor: Group
    pipeline: Group
    host_ranks: int = 1


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, ready to run plans."""

    artifact: Artifact
    shard: Shard
    runner: Runner
    capacity: Capacity


class _Report(msgspec.Struct, frozen=True, array_like=True):
    code: str
    what: str
    why: str
    hint: str


def split(spec: ReplicaSpec, comm: MPI.Intracomm | None) -> Ranks:
    """Groups of this rank. Raises :class:`EnvironmentFault` when the world has not tp * pp ranks."""
    size = 1 if comm is None else comm.Get_size()
    parallel = spec.parallel
    if size != parallel.world:
        raise EnvironmentFault(
            f"tp={parallel.tp} pp={parallel.pp} needs {parallel.world} ranks, the world has {size}",
            "mpiexec was started with another count",
            f"use mpiexec -n {parallel.world}",
        )
    if comm is None:
        return Ranks(world=Solo(), tensor=Solo(), pipeline=Solo())
    from mpi4py import MPI

    from workers.engine.mpi import Mpi

    rank, wait = comm.Get_rank(), spec.engine.wait
    # A transport's own sum may depend on the message's size, hence on batch mates.
    ordered = spec.engine.deterministic or spec.engine.fixed_shape
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return Ranks(
        world=Mpi(comm.Dup(), wait=wait),
        tensor=Mpi(comm.Split(parallel.pp_rank(rank), rank), deterministic=ordered, wait=wait),
        pipeline=Mpi(comm.Split(parallel.tp_rank(rank), rank), wait=wait),
        host_ranks=host.Get_size(),
    )


@contextmanager
def all_or_none(world: Group) -> Iterator[None]:
    """Run a block on every rank and raise everywhere what the first failing rank raised, before any rank goes on."""
    failure: TriremeError | None = None
    try:
        yield
    except TriremeError as error:
        failure = error
    except (OSError, RuntimeError, MemoryError) as error:
        failure = EngineFault("a rank could not be brought up", f"{type(error).__name__}: {error}"[:300])
    report = b""
    if failure is not None:
        report = msgspec.msgpack.encode(_Report(failure.code, failure.what[:300], failure.why[:300], failure.hint[:200]))
    reports = world.all_gather(torch.from_numpy(np.frombuffer(report[:_REPORT].ljust(_REPORT, b"\0"), np.uint8).copy()))
    if failure is not None:
        raise failure
    for rank, row in enumerate(reports):
        data = row.numpy().tobytes()
        if data[0]:
            told = msgspec.msgpack.Decoder(_Report).decode(data[: _length(data)])
            same = from_code(told.code, told.what)
            same.why, same.hint = f"rank {rank}: {told.why}" if told.why else f"found by rank {rank}", told.hint
            raise same


def _length(data: bytes) -> int:
    """Bytes before the padding."""
    return len(data.rstrip(b"\0"))


def probe(engine: EngineSpec) -> torch.dtype:
    """The dtype to compute in. Raises :class:`ConfigError` for what this machine will not do at the next launch either."""
    if engine.device != "cpu":
        raise ConfigError(f"device {engine.device} is not possible", "the portable engine computes on the CPU", "use device: cpu")
    if engine.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError("this CPU has no bfloat16 arithmetic", "neither AVX512-BF16 nor AMX was found", "use --dtype fp32")
    if engine.dtype == "fp16":
        raise ConfigError("fp16 is not computed on a CPU", "its products are slow and its range too small", "use --dtype fp32 or bf16")
    return _DTYPES[engine.dtype]


def _give_back() -> None:
    """Return to the system what loading and packing left free in the heap: up to 30 MB a rank, measured, which nothing later would use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries keep less
    if trim is not None:
        trim(0)


def bring_up(spec: ReplicaSpec, ranks: Ranks) -> Built:
    """Load this rank's shard and size its cache, together with all other ranks. Raises what any rank found wrong, on every rank."""
    engine, parallel, world = spec.engine, spec.parallel, ranks.world
    torch.set_num_threads(engine.threads)
    with all_or_none(world):
        dtype = probe(engine)
        artifact = open_artifact(Path(spec.artifact))
        shard = shard_of(artifact.model, parallel, world.rank)
        longest = min(engine.max_seq_len or artifact.model.max_position, artifact.model.max_position)
        stage = LlamaStage(
            artifact.model, parallel, shard, ranks.tensor, dtype=dtype, device=torch.device(engine.device), positions=longest
        )
        fill(stage.parameters(), load_shards(artifact, parallel, world.rank, engine.dtype))
        stage.freeze(fixed_rows=engine.fixed_shape)
        _give_back()
    with all_or_none(world):
        fitting = blocks_that_fit(artifact.model, shard, engine, host_ranks=ranks.host_ranks)
    blocks = agree(world, fitting)
    with all_or_none(world):
        cache = KvCache(artifact.model, shard, blocks=blocks, block_size=engine.block_size, dtype=dtype, device=stage.device)
    runner = Runner(
        stage,
        cache,
        pipeline=ranks.pipeline,
        tensor=ranks.tensor,
        slots=engine.max_batch_size,
        max_seq_len=longest,
        eos_ids=tuple(artifact.eos_ids),
        fixed_shape=engine.fixed_shape,
    )
    capacity = Capacity(
        block_size=engine.block_size,
        num_blocks=blocks,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        max_seq_len=longest,
        vocab_size=artifact.model.vocab_size,
        tp=parallel.tp,
        pp=parallel.pp,
        engine="portable",
        dtype=engine.dtype,
        quant=artifact.quant,
    )
    return Built(artifact=artifact, shard=shard, runner=runner, capacity=capacity)
