"""Hugging Face weights through TensorRT-LLM's LLM API (PyTorch backend, 1.2 and later): the Runtime behind
:mod:`workers.engines.trtllm.engine`.

Rank 0 makes one ``LLM`` over our own MPI world (``MpiCommSession``); the other ranks serve it from inside an ``MPICommExecutor``. Owns the
LLM, an event loop in a separate thread that reads the answers, and the only reader of statistics and cache events. Outputs arrive
cumulatively and are passed on as deltas.

mpi4py pickles tasks between TensorRT-LLM's ranks: they need a trusted network, like MPI itself.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from workers.artifacts.artifact import Artifact
from workers.engines.trtllm.engine import RuntimeStats
from workers.engines.trtllm.executor import EVENTS, regex_of, shut_down
from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.rank_liveness import LivenessMonitor, LivenessSender
from workers.engines.trtllm.sequence import Delta, Job
from workers.protocol.errors import EngineFault, Unsupported
from workers.protocol.messages import GuideSpec
from workers.protocol.specs import ReplicaSpec
from workers.protocol.trtllm_options import given

if TYPE_CHECKING:
    import tensorrt_llm
    from tensorrt_llm import llmapi

#: Longest wait for the next statistics, seconds.
STATS_S = 0.5

log = logging.getLogger("trireme.trtllm")


class LlmRuntime:
    """Implements :class:`workers.engines.trtllm.engine.Runtime` on rank 0. ``monitor``: None if there is no other rank."""

    def __init__(self, llm: tensorrt_llm.LLM, *, prefixes: HotPrefixes, monitor: LivenessMonitor | None) -> None:
        self._llm, self._prefixes, self._monitor = llm, prefixes, monitor
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stats = RuntimeStats()
        self._handles = 0
        self._over = threading.Event()
        self._loop = asyncio.new_event_loop()
        #: Used by the event loop only.
        self._live: dict[int, asyncio.Task[None]] = {}
        for work, name in ((self._loop.run_forever, "answers"), (self._observe, "statistics")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def start(self, job: Job) -> int:
        params = sampling_of(job)
        self._handles += 1
        self._loop.call_soon_threadsafe(self._begin, self._handles, job, params)
        return self._handles

    def cancel(self, handle: int) -> None:
        self._loop.call_soon_threadsafe(self._end, handle)

    def poll(self, wait_s: float) -> list[Delta]:
        found: list[Delta] = []
        try:
            found.append(self._deltas.get(timeout=wait_s) if wait_s > 0 else self._deltas.get_nowait())
            while True:
                found.append(self._deltas.get_nowait())
        except queue.Empty:
            return found

    def stats(self) -> RuntimeStats:
        if self._monitor is not None:
            self._monitor.check()
        while not self._records.empty():
            record = self._records.get()
            if "event_id" in record:
                self._take_event(record)
            else:
                self._stats = stats_of(record, self._stats)
        return self._stats

    def close(self, bound_s: float) -> None:
        self._over.set()
        shut_down(self._llm.shutdown, bound_s)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # in the event loop

    def _begin(self, handle: int, job: Job, params: tensorrt_llm.SamplingParams) -> None:
        self._live[handle] = self._loop.create_task(self._follow(handle, job, params))

    def _end(self, handle: int) -> None:
        task = self._live.pop(handle, None)
        if task is not None:
            task.cancel()

    async def _follow(self, handle: int, job: Job, params: tensorrt_llm.SamplingParams) -> None:
        output: llmapi.RequestOutput | None = None
        sent, over = 0, False
        try:
            output = self._llm.generate_async(inputs=job.input_ids, sampling_params=params, streaming=True, cache_salt=job.salt or None)
            async for _ in output:
                tokens, over = list(output.outputs[0].token_ids[sent:]), output.finished
                sent += len(tokens)
                self._deltas.put(Delta(handle, tokens, final=over))
        except Exception as error:  # the edge of this task: any exception of TensorRT-LLM ends only this request
            over = True
            self._deltas.put(Delta(handle, [], final=True, error=f"{type(error).__name__}: {error}"[:300]))
        finally:
            self._live.pop(handle, None)
            # Not in the published contract, so it is used only if it exists: without it a cancelled request runs to its end.
            abort = getattr(output, "abort", None)
            if not over and abort is not None:
                abort()

    # in the statistics thread

    def _observe(self) -> None:
        while not self._over.is_set():
            begin = time.monotonic()
            try:
                found = [*self._llm.get_stats(timeout=STATS_S), *self._llm.get_kv_cache_events(timeout=0)]
            except Exception as error:  # the edge of this thread: without statistics the progress check ends the replica
                if not self._over.is_set():
                    log.warning("no statistics: %s: %s", type(error).__name__, error)
                found = []
            for entry in found:
                self._records.put(msgspec.json.decode(entry) if isinstance(entry, str | bytes) else entry)
            # If the call returns at once, this thread must not spin.
            self._over.wait(max(0.0, 0.05 - (time.monotonic() - begin)))

    def _take_event(self, event: dict[str, Any]) -> None:
        self._prefixes.take_event(event["event_id"])
        data = event.get("data", {})
        if data.get("type") == "stored":
            blocks = [(block["block_hash"], [_id_of(token) for token in block["tokens"]]) for block in data["blocks"]]
            self._prefixes.stored(data["parent_hash"], blocks)
        elif data.get("type") == "removed":
            self._prefixes.removed(data["block_hashes"])


def _id_of(token: Any) -> int:
    """A token of an event: an id, or a mapping with ``token_id``, like the binding's ``UniqueToken``."""
    return int(token["token_id"]) if isinstance(token, dict) else int(token)


def stats_of(stats: dict[str, Any], before: RuntimeStats) -> RuntimeStats:
    """One iteration's statistics as JSON, of which every key may be missing."""
    batch, cache = stats.get("inflightBatchingStats") or {}, stats.get("kvCacheStats") or {}
    active = stats.get("numActiveRequests", 0)
    scheduled = batch.get("numScheduledRequests", active)
    return RuntimeStats(
        iteration=stats.get("iter", before.iteration + 1),
        step_ms=stats.get("iterLatencyMS", before.step_ms),
        running=scheduled,
        waiting=stats.get("numQueuedRequests", 0) + max(0, active - scheduled),
        free_blocks=cache.get("freeNumBlocks", before.free_blocks),
        num_blocks=cache.get("maxNumBlocks", before.num_blocks),
        block_size=cache.get("tokensPerBlock", before.block_size),
        reused_blocks=cache.get("reusedBlocks", before.reused_blocks),
        missed_blocks=cache.get("missedBlocks", before.missed_blocks),
    )


def sampling_of(job: Job) -> tensorrt_llm.SamplingParams:
    """Raises :class:`Unsupported` for log-probabilities, whose format is not published."""
    import tensorrt_llm

    params = job.params
    if params.logprobs is not None:
        raise Unsupported("logprobs is not offered by TensorRT-LLM's LLM API here", "what it returns is not published", param="logprobs")
    if params.logit_bias:
        raise Unsupported("logit_bias is not offered by TensorRT-LLM's LLM API here", param="logit_bias")
    if params.bad_words:
        raise Unsupported("bad_words is not offered by TensorRT-LLM's LLM API here", param="bad_words")
    greedy = params.temperature == 0.0
    return tensorrt_llm.SamplingParams(
        max_tokens=job.max_new,
        end_id=job.end_id or 0,
        pad_id=job.end_id or 0,
        stop_token_ids=list(job.further_stops) or None,
        ignore_eos=not job.stops,
        top_k=1 if greedy else params.top_k,
        top_p=None if greedy else params.top_p,
        min_p=None if greedy or params.min_p == 0.0 else params.min_p,
        temperature=None if greedy else params.temperature,
        seed=job.seed,
        min_tokens=job.min_new or None,
        repetition_penalty=None if params.repetition_penalty == 1.0 else params.repetition_penalty,
        presence_penalty=params.presence_penalty or None,
        frequency_penalty=params.frequency_penalty or None,
        guided_decoding=_guide(params.guide) if params.guide is not None else None,
        detokenize=False,
        exclude_input_from_output=True,
    )


def _guide(guide: GuideSpec) -> llmapi.GuidedDecodingParams:
    from tensorrt_llm import llmapi

    if guide.kind == "json":
        return llmapi.GuidedDecodingParams(json_object=True)
    if guide.kind == "json_schema":
        return llmapi.GuidedDecodingParams(json=guide.text)
    return llmapi.GuidedDecodingParams(regex=regex_of(guide))


class LlmFollower:
    """A rank other than 0: runs the tasks that rank 0's LLM sends, until it is shut down."""

    def __init__(self, tasks: Any, liveness: Any) -> None:
        self._tasks, self._liveness = tasks, liveness

    def run(self) -> None:
        from mpi4py.futures import MPICommExecutor

        with LivenessSender(self._liveness), MPICommExecutor(self._tasks, root=0):
            return


def make_llm(spec: ReplicaSpec, artifact: Artifact, tasks: Any | None) -> tensorrt_llm.LLM:
    """Rank 0's LLM. ``tasks``: communicator of all ranks, each of the others inside :meth:`LlmFollower.run`; None = a world of one."""
    import tensorrt_llm
    from tensorrt_llm import llmapi
    from tensorrt_llm.llmapi import mpi_session

    engine, options = spec.trtllm, spec.trtllm.options
    cache = llmapi.KvCacheConfig(
        enable_block_reuse=engine.prefix_cache,
        max_tokens=engine.kv_tokens or None,
        max_gpu_total_bytes=engine.kv_bytes,
        event_buffer_max_size=EVENTS if engine.prefix_cache else 0,
        **given(options.kv_cache),
        **given(options.llm_kv_cache),
    )
    session = None if tasks is None else mpi_session.MpiCommSession(comm=tasks, n_workers=spec.parallel.world)
    return tensorrt_llm.LLM(
        model=str(artifact.path),
        # Only grammars need a tokenizer here.
        skip_tokenizer_init=options.guided_decoding is None,
        tensor_parallel_size=spec.parallel.tp,
        pipeline_parallel_size=spec.parallel.pp,
        kv_cache_config=cache,
        enable_chunked_prefill=options.chunked_context is not False,
        guided_decoding_backend=options.guided_decoding,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        max_seq_len=longest(spec, artifact),
        max_beam_width=1,
        enable_iter_perf_stats=True,
        _mpi_session=session,
        **given(options.llm),
    )


def longest(spec: ReplicaSpec, artifact: Artifact) -> int:
    """Prompt and output tokens that a sequence may have together."""
    return min(spec.engine.max_seq_len or artifact.model.max_position, artifact.model.max_position)


def block_size(spec: ReplicaSpec, stats: RuntimeStats) -> int:
    """Tokens of a cache block. Raises :class:`EngineFault` if it differs from the requested number: the router would get wrong prefixes."""
    asked = spec.trtllm.options.llm_kv_cache.tokens_per_block
    if stats.block_size not in (0, asked):
        raise EngineFault(
            f"TensorRT-LLM made cache blocks of {stats.block_size} tokens, not {asked}",
            "",
            f"set trtllm.llm_kv_cache.tokens_per_block to {stats.block_size}",
        )
    return asked
