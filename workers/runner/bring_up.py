"""Brings up one rank: probes its device, loads the shard, sizes the cache, makes the runner.

Owns nothing afterwards but the order in which a rank goes down again: graphs, process groups, and only then MPI.
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
from workers.distributed.group import Waiter
from workers.distributed.rank_groups import Ranks, all_or_none
from workers.kernels.step_layout import HEAD_DIMS
from workers.layout.memory import blocks_that_fit, cache_budget, kv_format, longest_row
from workers.layout.quant_parts import unit_of
from workers.layout.sharding import Shard, shard_of
from workers.models.decoder import DecoderStage
from workers.models.layers import TORCH
from workers.protocol.errors import ConfigError
from workers.protocol.messages import Capacity, SamplingParams
from workers.protocol.specs import EngineSpec, ModelSpec, Quant, ReplicaSpec
from workers.runner.cpu_runner import CpuRunner
from workers.runner.device import CudaDevice, pin_numerics
from workers.runner.kv_cache import KvCache, agree, free_bytes
from workers.runner.step_results import PlanRunner
from workers.runner.weights import dummy, fill, load_shards, prove_shard
from workers.scheduler.step_plan import OpenSlot, StepPlan, column

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: CPU threads that read weights for a GPU.
_LOAD_THREADS = 8

log = logging.getLogger("trireme.engine")


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, ready to run plans."""

    artifact: Artifact
    shard: Shard
    runner: PlanRunner
    capacity: Capacity
    ranks: Ranks

    def close(self) -> None:
        """End the runner, then the groups that its graphs used; MPI comes after this."""
        self.runner.close()
        if self.ranks.nccl is not None:
            self.ranks.nccl.leave()


def probe(engine: EngineSpec, model: ModelSpec) -> torch.dtype:
    """The dtype to compute in. Raises :class:`ConfigError` for what this machine will not do at the next launch either."""
    if engine.device == "cuda":
        if model.head_dim not in HEAD_DIMS:
            known = ", ".join(map(str, HEAD_DIMS))
            raise ConfigError(f"head_dim {model.head_dim} is not possible on a GPU", f"its kernels take {known}", "use --device cpu")
        return _DTYPES[engine.dtype]
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
    on_gpu = ranks.device.type == "cuda"
    with ThreadPoolExecutor(1, "proof of weights") as pool:
        with all_or_none(world):
            artifact = open_artifact(Path(spec.artifact), bare=engine.load_format == "dummy")
            dtype = probe(engine, artifact.model)
            quant = quant_for(artifact, engine.quant)
            shard = shard_of(artifact.model, parallel, world.rank, unit=unit_of(quant))
            proof = pool.submit(prove_shard, artifact, parallel, world.rank, quant) if engine.load_format == "auto" else None
            if not on_gpu and proof is not None:
                proof.result()
            stage = _load(spec, ranks, artifact, shard, dtype, quant)
        longest, form = longest_row(artifact.model, engine), kv_format(engine, quant)
        with all_or_none(world):
            free = free_bytes(ranks.device)
            budget = cache_budget(artifact.model, shard, engine, free=free, host_ranks=ranks.host_ranks)
            log.info("memory: %.2f GB free with the weights in place, at most %.2f GB of it for the cache", free / 1e9, budget / 1e9)
            fitting = blocks_that_fit(artifact.model, shard, engine, form, budget)
        blocks = agree(world, fitting)
        with all_or_none(world):
            cache = KvCache(artifact.model, shard, blocks=blocks, block_size=engine.block_size, dtype=TORCH[form], device=stage.device)
            runner = _runner(spec, ranks, stage, cache, longest, artifact.eos_ids)
        with all_or_none(world):
            # A GPU waits for no hash: the file is read twice, side by side, and what was read wrongly is never served.
            if proof is not None:
                proof.result()
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
        quant=quant,
        prefix_cache=engine.prefix_cache,
    )
    tokens = blocks * engine.block_size
    log.info("KV cache: %d blocks hold %d tokens, or %.1f requests of %d tokens", blocks, tokens, tokens / longest, longest)
    return Built(artifact=artifact, shard=shard, runner=runner, capacity=capacity, ranks=ranks)


def _load(spec: ReplicaSpec, ranks: Ranks, artifact: Artifact, shard: Shard, dtype: torch.dtype, quant: Quant) -> DecoderStage:
    """This rank's stage with its weights."""
    engine, parallel, device = spec.engine, spec.parallel, ranks.device
    begin = time.perf_counter()
    longest = longest_row(artifact.model, engine)
    torch.set_num_threads(_LOAD_THREADS if device.type == "cuda" else engine.threads)
    if device.type == "cuda":
        pin_numerics()
    stage = DecoderStage(artifact.model, parallel, shard, ranks.tensor, dtype=dtype, device=device, positions=longest, quant=quant)
    if engine.load_format == "dummy":
        dummy(stage.parameters(), seed=ranks.world.rank)
    else:
        fill(stage.parameters(), load_shards(artifact, parallel, ranks.world.rank, engine.dtype, quant, proven=True))
    size = sum(parameter.nbytes for parameter in stage.parameters().values())
    stage.freeze(fixed_rows=engine.fixed_shape)
    torch.set_num_threads(engine.threads)
    _give_back()
    log.info("weights: %d bytes in place after %.1f s", size, time.perf_counter() - begin)
    return stage


def _runner(spec: ReplicaSpec, ranks: Ranks, stage: DecoderStage, cache: KvCache, longest: int, eos_ids: tuple[int, ...]) -> PlanRunner:
    engine, parallel = spec.engine, spec.parallel
    if ranks.device.type == "cpu":
        return CpuRunner(
            stage,
            cache,
            pipeline=ranks.pipeline,
            tensor=ranks.tensor,
            slots=engine.max_batch_size,
            max_seq_len=longest,
            eos_ids=eos_ids,
            fixed_shape=engine.fixed_shape,
        )
    # Triton is imported only where a GPU computes.
    from workers.kernels import step_ends
    from workers.runner.gpu_runner import GpuRunner, RankGroups

    runner = GpuRunner(
        stage,
        cache,
        CudaDevice(ranks.device),
        step_ends,
        RankGroups(ranks.tensor, ranks.pipeline, ranks.returns),
        slots=engine.max_batch_size,
        max_seq_len=longest,
        max_num_tokens=engine.max_num_tokens,
        depth=parallel.pp + 1,
        answers=stage.shard.tp_rank == 0,
        eos_ids=eos_ids,
        waiter=Waiter(engine.wait),
    )
    begin = time.perf_counter()
    _warm(runner, cache, min(engine.max_num_tokens, longest - 1))
    log.info("kernels are warm after %.1f s", time.perf_counter() - begin)
    begin = time.perf_counter()
    runner.capture()
    log.info("graphs are captured after %.1f s", time.perf_counter() - begin)
    return runner


def _warm(runner: PlanRunner, cache: KvCache, tokens: int) -> None:
    """Run a longest prefill, then a decode beside a short one and one alone: kernels are compiled, and a step's memory is taken, before
    anybody waits. The blocks used hold nothing that can be found."""
    size = cache.block_size
    tokens = min(tokens, (cache.blocks - 2) * size)
    if tokens < 1:
        return
    params = SamplingParams(temperature=0.0)
    held = -(-(tokens + 1) // size)
    first = StepPlan(
        step=-4,
        slots=column([0]),
        starts=column([0]),
        lengths=column([tokens]),
        tokens=column([0] * tokens),
        sample=column([1]),
        block_slots=column([0] * held),
        block_ids=column(list(range(held))),
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
        block_ids=column([held]),
        opened=[OpenSlot(1, params, short)],
    )
    third = StepPlan(step=-2, slots=column([1]), starts=column([short]), lengths=column([1]), tokens=column([0]), sample=column([1]))
    for plan in (first, second, third, StepPlan(step=-1, closed=column([0, 1]))):
        answer = runner.issue(plan)
        if answer is not None:
            answer.result()
