"""TensorRT engine shards through the C++ Executor of TensorRT-LLM 1.2: the Runtime behind :mod:`workers.engines.trtllm.engine`.

Every rank builds the same Executor in LEADER mode; afterwards only rank 0 enqueues, and the others block in C++ until rank 0 shuts it down.
Owns the Executor of this rank and the translation in both directions. Requests are built here, on the leader, from plain data; every name
used is in ``tests/contracts/tensorrt_llm_api.json``, and nothing depends on entries that this file marks as remembered. All calls come from
one thread.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from workers.engines.trtllm.engine import RuntimeStats
from workers.engines.trtllm.engine_dir import EngineDir
from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.rank_liveness import LivenessMonitor, LivenessSender
from workers.engines.trtllm.sequence import Delta, Job
from workers.protocol.errors import ConfigError, EngineFault, EnvironmentFault
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.protocol.specs import TrtllmSpec
from workers.protocol.trtllm_options import TrtllmOptions, given

if TYPE_CHECKING:
    from tensorrt_llm.bindings import executor as trt

#: Cache events that TensorRT-LLM keeps until the runtime takes them.
EVENTS = 16_384

log = logging.getLogger("trireme.trtllm")


class ExecutorRuntime:
    """Implements :class:`workers.engines.trtllm.engine.Runtime` on rank 0. ``monitor``: None if there is no other rank.

    Raises :class:`EnvironmentFault` if TensorRT-LLM uses another rank as its leader.
    """

    def __init__(
        self, executor: trt.Executor, *, vocab_size: int, options: TrtllmOptions, prefixes: HotPrefixes, monitor: LivenessMonitor | None
    ) -> None:
        if not executor.can_enqueue_requests():
            raise EnvironmentFault("rank 0 is not TensorRT-LLM's leader", "its Executor takes no requests", "see the rank's log")
        self._executor, self._vocab_size, self._options = executor, vocab_size, options
        self._prefixes, self._monitor = prefixes, monitor
        self._events: trt.kv_cache.KVCacheEventManager | None = executor.get_kv_cache_event_manager()
        self._stats = RuntimeStats()
        #: Tokens so far of the jobs whose log-probabilities are requested.
        self._scored: dict[int, int] = {}

    def start(self, job: Job) -> int:
        try:
            handle = int(self._executor.enqueue_request(request=request_of(job, self._vocab_size, self._options)))
        except (RuntimeError, ValueError) as error:
            raise EngineFault("TensorRT-LLM refused the request", _line(error)) from None
        if job.params.logprobs is not None:
            self._scored[handle] = 0
        return handle

    def cancel(self, handle: int) -> None:
        self._scored.pop(handle, None)
        self._executor.cancel_request(id=handle)

    def poll(self, wait_s: float) -> list[Delta]:
        try:
            responses = self._executor.await_responses(timeout=timedelta(seconds=wait_s))
        except RuntimeError as error:
            raise EngineFault("TensorRT-LLM failed", _line(error), "the replica is replaced whole") from None
        return [self._delta(response) for response in responses]

    def stats(self) -> RuntimeStats:
        if self._monitor is not None:
            self._monitor.check()
        for stats in self._executor.get_latest_iteration_stats():
            self._stats = stats_of(stats, self._stats)
        if self._events is not None:
            for event in self._events.get_latest_events(timeout_ms=0.0):
                self._take_event(event)
        return self._stats

    def close(self, bound_s: float) -> None:
        shut_down(self._executor.shutdown, bound_s)

    def _delta(self, response: trt.Response) -> Delta:
        handle = response.request_id
        if response.has_error():
            self._scored.pop(handle, None)
            return Delta(handle, [], final=True, error=response.error_msg)
        result = response.result
        tokens = list(result.output_token_ids[0])
        logprobs = self._logprobs(handle, result, len(tokens)) if handle in self._scored else None
        if result.is_final:
            self._scored.pop(handle, None)
        return Delta(handle, tokens, logprobs, final=result.is_final)

    def _logprobs(self, handle: int, result: trt.Result, count: int) -> list[float] | None:
        """The log-probabilities of the newest ``count`` tokens. It is not published whether streaming repeats the earlier ones: the length
        shows it."""
        total = self._scored[handle] = self._scored[handle] + count
        logprobs: list[float] = list(result.log_probs[0]) if result.log_probs else []
        if len(logprobs) >= total:
            return logprobs[total - count : total]
        return logprobs if len(logprobs) == count else None

    def _take_event(self, event: trt.kv_cache.KVCacheEvent) -> None:
        from tensorrt_llm.bindings import executor as trt

        self._prefixes.take_event(event.event_id)
        data = event.data
        if isinstance(data, trt.kv_cache.KVCacheStoredData):
            blocks = [(block.block_hash, [token.token_id for token in block.tokens]) for block in data.blocks]
            self._prefixes.stored(data.parent_hash, blocks)
        elif isinstance(data, trt.kv_cache.KVCacheRemovedData):
            self._prefixes.removed(data.block_hashes)


class ExecutorFollower:
    """A rank other than 0: its Executor works in its own threads until rank 0 shuts down."""

    def __init__(self, executor: trt.Executor, liveness: Any) -> None:
        self._executor, self._liveness = executor, liveness

    def run(self) -> None:
        with LivenessSender(self._liveness):
            self._executor.shutdown()


def stats_of(stats: trt.IterationStats, before: RuntimeStats) -> RuntimeStats:
    """One iteration's statistics; missing values are taken from ``before``."""
    batch, cache = stats.inflight_batching_stats, stats.kv_cache_stats
    scheduled = batch.num_scheduled_requests if batch is not None else stats.num_active_requests
    found = msgspec.structs.replace(
        before,
        iteration=stats.iter,
        step_ms=stats.iter_latency_ms,
        running=scheduled,
        waiting=stats.num_queued_requests + max(0, stats.num_active_requests - scheduled),
    )
    if cache is None:
        return found
    return msgspec.structs.replace(
        found,
        free_blocks=cache.free_num_blocks,
        num_blocks=cache.max_num_blocks,
        block_size=cache.tokens_per_block,
        reused_blocks=cache.reused_blocks,
        missed_blocks=cache.missed_blocks,
    )


def request_of(job: Job, vocab_size: int, options: TrtllmOptions) -> trt.Request:
    """The request of a job: streamed, without its input, ended by the lowest stop id or any other."""
    from tensorrt_llm.bindings import executor as trt

    params = job.params
    return trt.Request(
        input_token_ids=job.input_ids,
        max_tokens=job.max_new,
        streaming=True,
        sampling_config=sampling_of(params, job),
        output_config=trt.OutputConfig(return_log_probs=params.logprobs is not None, exclude_input_from_output=True),
        end_id=job.end_id,
        pad_id=job.end_id or 0,
        stop_words=[[stop] for stop in job.further_stops] or None,
        bad_words=[list(word) for word in params.bad_words] or None,
        embedding_bias=_bias(params.logit_bias, vocab_size) if params.logit_bias else None,
        lora_config=None if options.lora_task_id is None else trt.LoraConfig(task_id=options.lora_task_id),
        client_id=job.id,
        guided_decoding_params=_guide(params.guide) if params.guide is not None else None,
        cache_salt_id=salt_id(job.salt),
    )


def sampling_of(params: SamplingParams, job: Job) -> trt.SamplingConfig:
    """Greedy is ``top_k`` 1. Both ``top_k`` and ``top_p`` are always set: without both, TensorRT-LLM samples greedily too."""
    from tensorrt_llm.bindings import executor as trt

    greedy = params.temperature == 0.0
    return trt.SamplingConfig(
        beam_width=1,
        top_k=1 if greedy else params.top_k,
        top_p=None if greedy else params.top_p,
        min_p=None if greedy or params.min_p == 0.0 else params.min_p,
        temperature=None if greedy else params.temperature,
        seed=job.seed,
        min_tokens=job.min_new or None,
        repetition_penalty=None if params.repetition_penalty == 1.0 else params.repetition_penalty,
        presence_penalty=params.presence_penalty or None,
        frequency_penalty=params.frequency_penalty or None,
    )


def _guide(guide: GuideSpec) -> trt.GuidedDecodingParams:
    from tensorrt_llm.bindings import executor as trt

    kinds = trt.GuidedDecodingParams.GuideType
    if guide.kind == "json":
        return trt.GuidedDecodingParams(guide_type=kinds.JSON)
    if guide.kind == "json_schema":
        return trt.GuidedDecodingParams(guide_type=kinds.JSON_SCHEMA, guide=guide.text)
    return trt.GuidedDecodingParams(guide_type=kinds.REGEX, guide=regex_of(guide))


def regex_of(guide: GuideSpec) -> str:
    """The text of a regex guide, or a choice written as a regex."""
    if guide.kind == "regex":
        return guide.text
    return "|".join(_escape(choice) for choice in msgspec.json.decode(guide.text, type=list[str]))


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\.^$*+?{}[]|()/" else c for c in text)


def _bias(bias: dict[int, float], vocab_size: int) -> Any:
    """float32 [vocab_size]; TensorRT-LLM takes a torch tensor."""
    import torch

    values = torch.zeros(vocab_size, dtype=torch.float32)
    for token, value in bias.items():
        values[token] = value
    return values


def salt_id(salt: str) -> int | None:
    """TensorRT-LLM's salt is an integer: 63 bits of the tenant's salt, None without one."""
    return int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "little") >> 1 if salt else None


def chunked_context(engine: EngineDir, options: TrtllmOptions) -> bool:
    """Raises :class:`ConfigError` if it is requested and the engine cannot do it."""
    if options.chunked_context and not engine.paged_context_fmha:
        raise ConfigError(
            "trtllm.chunked_context is not possible with this engine",
            "it was built without use_paged_context_fmha",
            "leave it out, or build the engine again",
        )
    return engine.paged_context_fmha if options.chunked_context is None else options.chunked_context


def prefix_reuse(engine: EngineDir, spec: TrtllmSpec) -> bool:
    """Whether requests reuse K/V blocks by content."""
    return spec.prefix_cache and engine.paged_context_fmha


def config_of(engine: EngineDir, spec: TrtllmSpec) -> trt.ExecutorConfig:
    """The configuration of the Executor, the same on all ranks. Raises :class:`ConfigError`."""
    from tensorrt_llm.bindings import executor as trt

    options = spec.options
    reuse = prefix_reuse(engine, spec)
    if spec.prefix_cache and not reuse:
        log.warning("no prefix reuse: the engine was built without use_paged_context_fmha")
    return trt.ExecutorConfig(
        max_beam_width=1,
        scheduler_config=_scheduler(options),
        kv_cache_config=trt.KvCacheConfig(
            enable_block_reuse=reuse,
            max_tokens=spec.kv_tokens or None,
            max_gpu_total_bytes=spec.kv_bytes,
            event_buffer_max_size=EVENTS if reuse else 0,
            **given(options.kv_cache),
        ),
        enable_chunked_context=chunked_context(engine, options),
        batching_type=trt.BatchingType.INFLIGHT,
        max_batch_size=spec.max_batch_size,
        max_num_tokens=spec.max_num_tokens,
        parallel_config=trt.ParallelConfig(
            communication_type=trt.CommunicationType.MPI,
            communication_mode=trt.CommunicationMode.LEADER,
            device_ids=None if options.device_ids is None else list(options.device_ids),
        ),
        peft_cache_config=trt.PeftCacheConfig(**({} if options.peft_cache is None else given(options.peft_cache))),
        decoding_config=_decoding(options),
        extended_runtime_perf_knob_config=trt.ExtendedRuntimePerfKnobConfig(
            **({} if options.perf_knobs is None else given(options.perf_knobs))
        ),
        guided_decoding_config=_guided(engine, options),
        **given(options.executor),
    )


def _scheduler(options: TrtllmOptions) -> trt.SchedulerConfig:
    from tensorrt_llm.bindings import executor as trt

    asked = options.scheduler
    policy, chunking, dynamic = asked.capacity_scheduler_policy, asked.context_chunking_policy, asked.dynamic_batch
    return trt.SchedulerConfig(
        capacity_scheduler_policy=getattr(trt.CapacitySchedulerPolicy, policy or "GUARANTEED_NO_EVICT"),
        context_chunking_policy=None if chunking is None else getattr(trt.ContextChunkingPolicy, chunking),
        dynamic_batch_config=None if dynamic is None else trt.DynamicBatchConfig(**given(dynamic)),
    )


def _decoding(options: TrtllmOptions) -> trt.DecodingConfig | None:
    from tensorrt_llm.bindings import executor as trt

    asked = options.decoding
    if asked is None:
        return None
    return trt.DecodingConfig(
        decoding_mode=None if asked.mode is None else getattr(trt.DecodingMode, asked.mode)(),
        medusa_choices=None if asked.medusa_choices is None else [list(path) for path in asked.medusa_choices],
        eagle_config=None if asked.eagle is None else trt.EagleConfig(**given(asked.eagle)),
    )


def _guided(engine: EngineDir, options: TrtllmOptions) -> trt.GuidedDecodingConfig | None:
    """Raises :class:`ConfigError` if the engine's folder has no tokenizer."""
    from tensorrt_llm.bindings import executor as trt

    if options.guided_decoding is None:
        return None
    if engine.tokenizer_dir is None:
        raise ConfigError("trtllm.guided_decoding needs a tokenizer", f"{engine.path} has no tokenizer.json", "copy the model's there")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(engine.tokenizer_dir / "tokenizer.json"))
    by_id = {id: text for text, id in tokenizer.get_vocab(with_added_tokens=True).items()}
    backends = trt.GuidedDecodingConfig.GuidedDecodingBackend
    return trt.GuidedDecodingConfig(
        backend=backends.XGRAMMAR if options.guided_decoding == "xgrammar" else backends.LLGUIDANCE,
        encoded_vocab=[by_id.get(id, "") for id in range(engine.vocab_size)],
        tokenizer_str=tokenizer.to_str(),
        stop_token_ids=list(engine.eos_ids) or None,
    )


def make_executor(engine: EngineDir, spec: TrtllmSpec) -> trt.Executor:
    """This rank's Executor; returns when all ranks have built theirs, as far as TensorRT-LLM waits for them. Raises TensorRT-LLM's
    exceptions."""
    from tensorrt_llm.bindings import executor as trt

    return trt.Executor(model_path=str(engine.path), model_type=trt.ModelType.DECODER_ONLY, executor_config=config_of(engine, spec))


def shut_down(call: Any, bound_s: float) -> None:
    """Make a call that may never return. Raises :class:`EngineFault` after ``bound_s``; the thread is then abandoned."""
    over = threading.Event()

    def run() -> None:
        try:
            call()
        finally:
            over.set()

    threading.Thread(target=run, name="shutdown", daemon=True).start()
    if not over.wait(bound_s):
        raise EngineFault(f"TensorRT-LLM did not shut down within {bound_s:g} s", "", "its processes are killed")


def _line(error: BaseException) -> str:
    return str(error).replace("\n", " ")[:300]
