"""Brings up one rank: checks its device, loads the shard, sizes the KV cache and makes the runner.

Afterwards it owns only the order in which a rank shuts down: captured graphs, then process groups, and only then MPI.
"""

from __future__ import annotations

import ctypes
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from workers.artifacts.artifact import Artifact, open_artifact, quant_for
from workers.distributed.agreement import all_or_none
from workers.distributed.group import Waiter
from workers.distributed.rank_groups import RankContext
from workers.layout.memory import block_bytes, blocks_that_fit, cache_budget, cache_room, check_room, kv_format, longest_sequence
from workers.layout.quant_parts import unit_of
from workers.layout.sharding import Shard, shard_of
from workers.models.decoder import DecoderStage
from workers.models.layers import TORCH
from workers.protocol.errors import ConfigError
from workers.protocol.messages import Capacity, SamplingParams
from workers.protocol.specs import GPU_HEAD_DIMS, EngineSpec, ModelSpec, Quant, ReplicaSpec
from workers.runner.cpu_runner import CpuRunner
from workers.runner.device import CudaDevice, pin_numerics
from workers.runner.kv_cache import KvCache, device_memory, fewest_blocks
from workers.runner.step_results import PlanRunner
from workers.runner.weights import fill, fill_dummy, load_shards, verify_shard
from workers.scheduler.step_plan import OpenSlot, StepPlan, column

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: CPU threads that read weights for a GPU.
_LOAD_THREADS = 8

log = logging.getLogger("trireme.engine")


class BuiltRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, ready to run plans."""

    artifact: Artifact
    shard: Shard
    runner: PlanRunner
    capacity: Capacity
    context: RankContext

    def close(self) -> None:
        """Close the runner, then leave the groups that its graphs used. MPI is finalized only after this."""
        self.runner.close()
        if self.context.nccl is not None:
            self.context.nccl.leave()


def compute_dtype(engine: EngineSpec, model: ModelSpec) -> torch.dtype:
    """The dtype that ``engine`` computes in.

    Raises:

    ConfigError: this machine cannot compute the model in it. Another launch would fail in the same way.
    """
    if engine.device == "cuda":
        if model.head_dim not in GPU_HEAD_DIMS:
            known = ", ".join(map(str, GPU_HEAD_DIMS))
            raise ConfigError(f"head_dim {model.head_dim} is not possible on a GPU", f"its kernels take {known}", "use --device cpu")
        return _DTYPES[engine.dtype]
    if engine.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError("this CPU has no bfloat16 arithmetic", "neither AVX512-BF16 nor AMX was found", "use --dtype fp32")
    if engine.dtype == "fp16":
        raise ConfigError("fp16 is not computed on a CPU", "its products are slow and its range too small", "use --dtype fp32 or bf16")
    return _DTYPES[engine.dtype]


def _trim_heap() -> None:
    """Return free heap memory to the system: loading leaves up to 30 MB a rank, measured, that nothing uses later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has this function; other C libraries keep less
    if trim is not None:
        trim(0)


def bring_up(spec: ReplicaSpec, context: RankContext) -> BuiltRank:
    """Load this rank's shard and size its cache, together with all other ranks. Raises the error of any rank on every rank."""
    engine, parallel, world = spec.portable, spec.parallel, context.world
    on_gpu = context.device.type == "cuda"
    with ThreadPoolExecutor(1, "verify weights") as pool:
        with all_or_none(context.comm):
            artifact = open_artifact(Path(spec.artifact), weights_optional=engine.options.load_format == "dummy")
            dtype = compute_dtype(engine, artifact.model)
            quant = quant_for(artifact, engine.options.quant)
            shard = shard_of(artifact.model, parallel, world.rank, unit=unit_of(quant))
            verified = pool.submit(verify_shard, artifact, parallel, world.rank, quant) if engine.options.load_format == "auto" else None
            if not on_gpu and verified is not None:
                verified.result()
            stage = _load(spec, context, artifact, shard, dtype, quant)
        max_seq_len, form = longest_sequence(artifact.model, engine), kv_format(engine, quant)
        with all_or_none(context.comm):
            free, total = device_memory(context.device)
            room = cache_room(artifact.model, shard, engine, free=free, total=total, host_ranks=context.host_ranks)
            budget = cache_budget(engine, room, context.host_ranks)
            log.info("memory: %.2f GB free with the weights in place, at most %.2f GB of it for the cache", free / 1e9, budget / 1e9)
            fitting = blocks_that_fit(artifact.model, shard, engine, form, budget)
            check_room(fitting, block_bytes(artifact.model, shard, engine, form), room)
        blocks = fewest_blocks(world, fitting)
        with all_or_none(context.comm):
            cache = KvCache(artifact.model, shard, blocks=blocks, block_size=engine.block_size, dtype=TORCH[form], device=stage.device)
            runner = _runner(spec, context, stage, cache, max_seq_len, artifact.eos_ids)
        with all_or_none(context.comm):
            # On a GPU the hash is computed during the loading, with a second read of the file; a damaged file is detected before the
            # replica serves.
            if verified is not None:
                verified.result()
    capacity = Capacity(
        block_size=engine.block_size,
        num_blocks=blocks,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        max_seq_len=max_seq_len,
        vocab_size=artifact.model.vocab_size,
        tp=parallel.tp,
        pp=parallel.pp,
        engine="portable",
        dtype=engine.dtype,
        quant=quant,
        prefix_cache=engine.prefix_cache,
    )
    tokens = blocks * engine.block_size
    log.info("KV cache: %d blocks hold %d tokens, or %.1f requests of %d tokens", blocks, tokens, tokens / max_seq_len, max_seq_len)
    return BuiltRank(artifact=artifact, shard=shard, runner=runner, capacity=capacity, context=context)


def _load(spec: ReplicaSpec, context: RankContext, artifact: Artifact, shard: Shard, dtype: torch.dtype, quant: Quant) -> DecoderStage:
    """This rank's stage with its weights, frozen."""
    engine, parallel, device = spec.portable, spec.parallel, context.device
    begin = time.perf_counter()
    positions = longest_sequence(artifact.model, engine)
    torch.set_num_threads(_LOAD_THREADS if device.type == "cuda" else engine.threads)
    if device.type == "cuda":
        pin_numerics()
    tensor = context.groups.tensor
    stage = DecoderStage(artifact.model, parallel, shard, tensor, dtype=dtype, device=device, positions=positions, quant=quant)
    if engine.options.load_format == "dummy":
        fill_dummy(stage.parameters(), seed=context.world.rank)
    else:
        fill(stage.parameters(), load_shards(artifact, parallel, context.world.rank, engine.dtype, quant, verified=True))
    size = sum(parameter.nbytes for parameter in stage.parameters().values())
    stage.freeze(fixed_rows=engine.fixed_shape)
    torch.set_num_threads(engine.threads)
    _trim_heap()
    log.info("weights: %d bytes in place after %.1f s", size, time.perf_counter() - begin)
    return stage


def _runner(
    spec: ReplicaSpec, context: RankContext, stage: DecoderStage, cache: KvCache, max_seq_len: int, eos_ids: tuple[int, ...]
) -> PlanRunner:
    """The runner of this rank's device; on a GPU warmed up and with its graphs captured."""
    engine, parallel = spec.engine, spec.parallel
    if context.device.type == "cpu":
        return CpuRunner(
            stage,
            cache,
            pipeline=context.groups.pipeline,
            tensor=context.groups.tensor,
            slots=engine.max_batch_size,
            max_seq_len=max_seq_len,
            eos_ids=eos_ids,
            fixed_shape=engine.fixed_shape,
        )
    # Triton is imported only on a GPU.
    from workers.kernels import step_ends
    from workers.runner.gpu_runner import GpuRunner

    runner = GpuRunner(
        stage,
        cache,
        CudaDevice(context.device),
        step_ends,
        context.groups,
        slots=engine.max_batch_size,
        max_seq_len=max_seq_len,
        max_num_tokens=engine.max_num_tokens,
        depth=parallel.pp + 1,
        reports_results=stage.shard.tp_rank == 0,
        eos_ids=eos_ids,
        waiter=Waiter(engine.wait),
    )
    begin = time.perf_counter()
    _warm_up(runner, cache, min(engine.max_num_tokens, max_seq_len - 1))
    log.info("kernels are warm after %.1f s", time.perf_counter() - begin)
    begin = time.perf_counter()
    runner.capture()
    log.info("graphs are captured after %.1f s", time.perf_counter() - begin)
    return runner


def _warm_up(runner: PlanRunner, cache: KvCache, tokens: int) -> None:
    """Run the longest prefill, then a decode together with a short prefill, then a decode alone: this compiles the kernels and allocates
    the memory of a step before the first request. No prefix hit can find the blocks that it uses."""
    size = cache.block_size
    tokens = min(tokens, (cache.blocks - 2) * size)
    if tokens < 1:
        return
    params = SamplingParams(temperature=0.0)
    used = -(-(tokens + 1) // size)
    first = StepPlan(
        step=-4,
        slots=column([0]),
        starts=column([0]),
        lengths=column([tokens]),
        tokens=column([0] * tokens),
        sample=column([1]),
        block_slots=column([0] * used),
        block_ids=column(list(range(used))),
        opened=[OpenSlot(0, params, tokens)],
    )
    short = min(size - 1, tokens)
    second = StepPlan(
        step=-3,
        slots=column([0, 1]),
        starts=column([tokens, 0]),
        lengths=column([1, short]),
        tokens=column([0] * (1 + short)),
        sample=column([1, 1]),
        block_slots=column([1]),
        block_ids=column([used]),
        opened=[OpenSlot(1, params, short)],
    )
    third = StepPlan(step=-2, slots=column([1]), starts=column([short]), lengths=column([1]), tokens=column([0]), sample=column([1]))
    for plan in (first, second, third, StepPlan(step=-1, closed=column([0, 1]))):
        pending = runner.issue(plan)
        if pending is not None:
            pending.result()
