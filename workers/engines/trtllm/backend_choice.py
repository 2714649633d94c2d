"""Chooses which of TensorRT-LLM's two backends runs an artifact, and brings up this rank's part.

The choice depends on what the installed package can do, never on its version's text: TensorRT-LLM 1.3 has no engines. Owns the bring-up:
agree on everything that can be checked before, build on every rank, wait for a first message of every rank, generate one token. An error
before the build is raised on all ranks. An error in or after it is known to one rank only, which must end the world
(:class:`~workers.process.Alone`).
"""

from __future__ import annotations

import importlib
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from workers.artifacts.artifact import Artifact
from workers.distributed.agreement import all_or_none
from workers.engines.trtllm import executor, llmapi
from workers.engines.trtllm.engine import RuntimeStats, TrtllmEngine, warm_up
from workers.engines.trtllm.engine_dir import EngineDir
from workers.engines.trtllm.error_map import explain
from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.model import open_model
from workers.engines.trtllm.node_probe import installed_versions
from workers.engines.trtllm.preflight import check_rank
from workers.engines.trtllm.rank_liveness import LivenessMonitor
from workers.engines.trtllm.sequence import TrtllmLimits
from workers.process import Alone
from workers.protocol.engine import Follower
from workers.protocol.errors import ConfigError, EnvironmentFault, TriremeError
from workers.protocol.messages import Capacity
from workers.protocol.specs import Quant, ReplicaSpec
from workers.protocol.trtllm_options import Backend

PACKAGE = "tensorrt_llm"
#: Capability -> (module, the name in it that proves it).
PROBES: dict[Backend, tuple[str, str]] = {"executor": (f"{PACKAGE}.bindings.executor", "Executor"), "llmapi": (PACKAGE, "LLM")}


def installed() -> str:
    """The installed version, for messages and for the comparison with an engine's; empty if not installed."""
    return installed_versions().get(PACKAGE, "")


def capable(backend: Backend) -> bool:
    """Whether the installed package has it. Imports the package, which starts CUDA."""
    module, name = PROBES[backend]
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def choose(spec: ReplicaSpec, model: EngineDir | Artifact) -> Backend:
    """The backend that fits. Raises :class:`EnvironmentFault` if none fits, ConfigError if the requested one does not fit."""
    options = spec.trtllm.options
    fitting: Backend = "executor" if isinstance(model, EngineDir) else "llmapi"
    if options.backend not in ("auto", fitting):
        kind = "an engine folder" if fitting == "executor" else "Hugging Face weights"
        raise ConfigError(f"trtllm.backend: {options.backend} does not serve {spec.artifact}", f"it holds {kind}", f"backend: {fitting}")
    if find_spec(PACKAGE) is None:
        hint = "install it from NVIDIA's package index or use its container image; --engine portable needs neither"
        raise EnvironmentFault("TensorRT-LLM is not installed here", f"there is no package {PACKAGE}", hint)
    if capable(fitting):
        options.refuse_others(fitting)
        return fitting
    found = f"the installed version is {installed() or 'unknown'}"
    if fitting == "executor":
        hint = "install tensorrt_llm>=1.2,<1.3, or serve the model's Hugging Face folder"
        raise EnvironmentFault("this TensorRT-LLM runs no engines", f"{found}; engines left it after the 1.2 line", hint)
    raise EnvironmentFault("this TensorRT-LLM has no LLM API", found, "install tensorrt_llm>=1.2, or build an engine of the model")


def build(spec: ReplicaSpec, comm: Any) -> TrtllmEngine | Follower:
    """This rank's part. Raises the same TriremeError on every rank, or :class:`Alone`. Every wait ends at ``trtllm.start_timeout_s``."""
    deadline = time.monotonic() + spec.trtllm.options.start_timeout_s
    with all_or_none(comm):
        model = open_model(spec.artifact)
        if spec.tokenizer:
            model = msgspec.structs.replace(model, tokenizer_dir=Path(spec.tokenizer))
        choose(spec, model)
        if isinstance(model, EngineDir):
            check_rank(model, spec, installed=installed())
            executor.chunked_context(model, spec.trtllm.options)
        _check_threads(comm)
    rank, liveness, tasks = comm.Get_rank(), comm.Dup(), comm.Dup()
    monitor = LivenessMonitor(liveness, spec.hang_floor_s) if rank == 0 and comm.Get_size() > 1 else None
    try:
        if isinstance(model, EngineDir):
            return _with_executor(spec, model, rank, liveness, monitor, deadline)
        return _with_llm(spec, model, rank, liveness, tasks, monitor, deadline)
    except (TriremeError, RuntimeError, ValueError, TypeError, MemoryError, OSError) as failure:
        raise Alone(explain(failure, rank)) from failure


def _check_threads(comm: Any) -> None:
    """TensorRT-LLM calls MPI from threads of its own."""
    from mpi4py import MPI

    if comm.Get_size() > 1 and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise EnvironmentFault(
            "MPI was not started for several threads", "TensorRT-LLM calls it from its own", "start the ranks with --mpi-multiple"
        )


def _with_executor(
    spec: ReplicaSpec, model: EngineDir, rank: int, liveness: Any, monitor: LivenessMonitor | None, deadline: float
) -> TrtllmEngine | Follower:
    built = executor.make_executor(model, spec.trtllm)
    if rank > 0:
        return executor.ExecutorFollower(built, liveness)
    if monitor is not None:
        monitor.await_all(deadline)
    options, prefixes = spec.trtllm.options, HotPrefixes(model.tokens_per_block)
    runtime = executor.ExecutorRuntime(built, vocab_size=model.vocab_size, options=options, prefixes=prefixes, monitor=monitor)
    stats = warm_up(runtime, deadline, eos_ids=model.eos_ids)
    longest = spec.engine.max_seq_len or model.max_seq_len
    capacity = _capacity(
        spec,
        stats,
        longest,
        vocab_size=model.vocab_size,
        block_size=model.tokens_per_block,
        dtype=model.dtype,
        quant=model.quant,
        prefix_cache=executor.prefix_reuse(model, spec.trtllm),
    )
    chunked = executor.chunked_context(model, options)
    longest_input = longest if chunked else min(longest, model.max_input_len, capacity.max_num_tokens)
    return _engine(runtime, TrtllmLimits(capacity=capacity, max_input_len=longest_input, eos_ids=model.eos_ids), prefixes, spec)


def _with_llm(
    spec: ReplicaSpec, model: Artifact, rank: int, liveness: Any, tasks: Any, monitor: LivenessMonitor | None, deadline: float
) -> TrtllmEngine | Follower:
    if rank > 0:
        return llmapi.LlmFollower(tasks, liveness)
    if monitor is not None:
        monitor.await_all(deadline)
    prefixes = HotPrefixes(spec.trtllm.options.llm_kv_cache.tokens_per_block)
    runtime = llmapi.LlmRuntime(
        llmapi.make_llm(spec, model, tasks if spec.parallel.world > 1 else None), prefixes=prefixes, monitor=monitor
    )
    stats = warm_up(runtime, deadline, eos_ids=model.eos_ids)
    size, longest = llmapi.block_size(spec, stats), llmapi.longest(spec, model)
    capacity = _capacity(
        spec,
        stats,
        longest,
        vocab_size=model.model.vocab_size,
        block_size=size,
        dtype=model.dtype,
        quant=model.quant,
        prefix_cache=spec.engine.prefix_cache,
    )
    chunked = spec.trtllm.options.chunked_context is not False
    longest_input = longest if chunked else min(longest, capacity.max_num_tokens)
    return _engine(runtime, TrtllmLimits(capacity=capacity, max_input_len=longest_input, eos_ids=model.eos_ids), prefixes, spec)


def _capacity(
    spec: ReplicaSpec,
    stats: RuntimeStats,
    longest: int,
    *,
    vocab_size: int,
    block_size: int,
    dtype: str,
    quant: Quant,
    prefix_cache: bool,
) -> Capacity:
    engine = spec.trtllm
    return Capacity(
        block_size=block_size,
        num_blocks=stats.num_blocks,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        max_seq_len=longest,
        vocab_size=vocab_size,
        tp=spec.parallel.tp,
        pp=spec.parallel.pp,
        guided=engine.options.guided_decoding is not None,
        max_logprobs=0,
        engine="trtllm",
        dtype=dtype,
        quant=quant,
        prefix_cache=prefix_cache,
    )


def _engine(
    runtime: executor.ExecutorRuntime | llmapi.LlmRuntime, limits: TrtllmLimits, prefixes: HotPrefixes, spec: ReplicaSpec
) -> TrtllmEngine:
    return TrtllmEngine(runtime, limits, prefixes, poll_s=spec.trtllm.options.poll_ms / 1000.0, hang_s=spec.hang_floor_s)
