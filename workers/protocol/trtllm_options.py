"""Options that a deployment passes through to TensorRT-LLM; ``None`` = TensorRT-LLM's default.

Owns names and types only; field names are TensorRT-LLM's own, so its documentation applies. Options that the deployment sets elsewhere
(layout, limits, KV size, prefix reuse) and options without a name in the published API are not included. A layer-0 module: imports nothing
heavy.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from workers.protocol.errors import ConfigError

Backend = Literal["executor", "llmapi"]


class KvCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``KvCacheConfig``. ``host_cache_size``: bytes of host memory that blocks are offloaded to."""

    free_gpu_memory_fraction: float | None = None
    host_cache_size: int | None = None
    max_attention_window: tuple[int, ...] | None = None
    sink_token_length: int | None = None
    onboard_blocks: bool | None = None
    secondary_offload_min_priority: int | None = None
    enable_partial_reuse: bool | None = None
    copy_on_partial_reuse: bool | None = None
    use_uvm: bool | None = None

    def __post_init__(self) -> None:
        fraction = self.free_gpu_memory_fraction
        if fraction is not None and not 0.0 < fraction < 1.0:
            raise ConfigError(f"free_gpu_memory_fraction must be between 0 and 1, got {fraction}")


class DynamicBatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``DynamicBatchConfig``."""

    enable_batch_size_tuning: bool
    enable_max_num_tokens_tuning: bool
    dynamic_batch_moving_average_window: int


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``SchedulerConfig``."""

    capacity_scheduler_policy: Literal["MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"] | None = None
    context_chunking_policy: Literal["EQUAL_PROGRESS", "FIRST_COME_FIRST_SERVED"] | None = None
    dynamic_batch: DynamicBatchOptions | None = None


class PeftCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``PeftCacheConfig``: where LoRA adapters are kept; ``lora_prefetch_dir`` is read at start."""

    num_host_module_layer: int | None = None
    num_device_module_layer: int | None = None
    optimal_adapter_size: int | None = None
    max_adapter_size: int | None = None
    num_put_workers: int | None = None
    num_ensure_workers: int | None = None
    num_copy_streams: int | None = None
    max_pages_per_block_host: int | None = None
    max_pages_per_block_device: int | None = None
    device_cache_percent: float | None = None
    host_cache_size: int | None = None
    lora_prefetch_dir: str | None = None


class EagleOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``EagleConfig``."""

    eagle_choices: tuple[tuple[int, ...], ...] | None = None
    greedy_sampling: bool | None = None
    posterior_threshold: float | None = None
    use_dynamic_tree: bool | None = None
    dynamic_tree_max_topK: int | None = None  # noqa: N815 - TensorRT-LLM's own spelling


class DecodingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``DecodingConfig``: speculative decoding that the engine was built for."""

    mode: Literal["Auto", "TopK", "TopP", "TopKTopP", "Medusa", "ExplicitDraftTokens", "Eagle"] | None = None
    medusa_choices: tuple[tuple[int, ...], ...] | None = None
    eagle: EagleOptions | None = None


class ExecutorOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The other fields of ``ExecutorConfig``."""

    normalize_log_probs: bool | None = None
    use_gpu_direct_storage: bool | None = None
    gpu_weights_percent: float | None = None
    max_queue_size: int | None = None
    recv_poll_period_ms: int | None = None
    max_seq_idle_microseconds: int | None = None
    enable_trt_overlap: bool | None = None
    fail_fast_on_attention_window_too_large: bool | None = None


class PerfKnobOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constructor's fields of ``ExtendedRuntimePerfKnobConfig``."""

    multi_block_mode: bool | None = None
    enable_context_fmha_fp32_acc: bool | None = None


class LlmKvCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``KvCacheConfig`` of the LLM API: fields that are fixed in a built engine."""

    tokens_per_block: int = 32
    dtype: str | None = None


class LlmOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``LLM(...)`` of the PyTorch backend."""

    trust_remote_code: bool | None = None
    gpus_per_node: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool | None = None
    load_format: Literal["auto", "dummy"] | None = None
    enable_lora: bool | None = None
    attn_backend: str | None = None
    sampler_type: Literal["TRTLLMSampler", "TorchSampler", "auto"] | None = None
    disable_overlap_scheduler: bool | None = None
    allreduce_strategy: (
        Literal["AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"] | None
    ) = None
    enable_min_latency: bool | None = None
    enable_autotuner: bool | None = None
    stream_interval: int | None = None
    batch_wait_timeout_ms: float | None = None
    force_dynamic_quantization: bool | None = None


class TrtllmOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``models[].trtllm`` of a deployment.

    ``backend``: auto = the one that fits the artifact. ``start_timeout_s`` bounds loading and the warm-up request. ``poll_ms``: longest
    wait for responses, and so the longest delay of a new request. ``chunked_context``: None = as the engine was built. ``device_ids``: GPU
    indices of a node's ranks, in rank order. ``lora_task_id``: adapter of every request (from ``lora_prefetch_dir``). ``executor``,
    ``perf_knobs``, ``decoding``, ``scheduler``, ``peft_cache``, ``device_ids`` and ``lora_task_id`` are for engine shards; ``llm`` and
    ``llm_kv_cache`` are for the LLM API.
    """

    backend: Literal["auto", "executor", "llmapi"] = "auto"
    start_timeout_s: float = 600.0
    poll_ms: int = 10
    chunked_context: bool | None = None
    guided_decoding: Literal["xgrammar", "llguidance"] | None = None
    device_ids: tuple[int, ...] | None = None
    lora_task_id: int | None = None
    kv_cache: KvCacheOptions = KvCacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    peft_cache: PeftCacheOptions | None = None
    decoding: DecodingOptions | None = None
    executor: ExecutorOptions = ExecutorOptions()
    perf_knobs: PerfKnobOptions | None = None
    llm: LlmOptions = LlmOptions()
    llm_kv_cache: LlmKvCacheOptions = LlmKvCacheOptions()

    def __post_init__(self) -> None:
        if self.start_timeout_s <= 0:
            raise ConfigError(f"start_timeout_s must be above 0, got {self.start_timeout_s}")
        if not 1 <= self.poll_ms <= 1000:
            raise ConfigError(f"poll_ms must be 1 to 1000, got {self.poll_ms}", "submissions and cancellations wait for a poll's end")

    def refuse_others(self, backend: Backend) -> None:
        """Raises :class:`ConfigError` naming an option that is set here but not supported by ``backend``."""
        served = "the C++ Executor" if backend == "executor" else "the LLM API"
        for name in _LLM_ONLY if backend == "executor" else _EXECUTOR_ONLY:
            if getattr(self, name) != _DEFAULTS[name]:
                raise ConfigError(f"trtllm.{name} means nothing here", f"this artifact is served by {served}", "leave it out")


_LLM_ONLY = ("llm", "llm_kv_cache")
_EXECUTOR_ONLY = ("executor", "perf_knobs", "decoding", "scheduler", "peft_cache", "device_ids", "lora_task_id")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(TrtllmOptions)}


def given(options: msgspec.Struct) -> dict[str, Any]:
    """The options that are set, as keywords for TensorRT-LLM; sequences as lists, which its bindings require."""
    pairs = ((name, getattr(options, name)) for name in options.__struct_fields__)
    return {name: _plain(value) for name, value in pairs if value is not None}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
