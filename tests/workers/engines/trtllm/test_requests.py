"""What TensorRT-LLM is told: configurations and requests, built over the fake, whose constructors take what the published API takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.deployment_file import load
from tests.support.hardware import decided
from tests.support.tiny_models import tiny_gguf
from tests.support.trtllm_host import FAKES, checkpoint_of
from workers.__main__ import parse
from workers.engines.trtllm import executor, llmapi
from workers.engines.trtllm.engine_dir import EngineDir
from workers.engines.trtllm.model import open_model
from workers.engines.trtllm.sequence import Job
from workers.protocol import trtllm_options
from workers.protocol.errors import ArtifactError, ConfigError, Unsupported
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.protocol.specs import Parallel, Quant, TrtllmSpec
from workers.protocol.trtllm_options import TrtllmOptions

ENGINE = EngineDir(
    path=Path("/engine"), version="1.2.1", parallel=Parallel(tp=2), world=2, vocab_size=320, max_batch_size=64, max_num_tokens=256,
    max_seq_len=2048, max_input_len=1024, max_beam_width=1, tokens_per_block=32, dtype="float16", quant=Quant(), paged_kv_cache=True,
    paged_context_fmha=True, eos_ids=(256,), tokenizer_dir=None, record=None,
)  # fmt: skip

#: One value for everything that a deployment may pass to the Executor.
EVERYTHING = TrtllmOptions(
    chunked_context=True,
    device_ids=(0, 1),
    kv_cache=trtllm_options.KvCacheOptions(
        free_gpu_memory_fraction=0.5, host_cache_size=1 << 30, max_attention_window=(1024,), sink_token_length=4, onboard_blocks=False,
        secondary_offload_min_priority=10, enable_partial_reuse=False, copy_on_partial_reuse=False, use_uvm=False,
    ),
    scheduler=trtllm_options.SchedulerOptions(
        capacity_scheduler_policy="MAX_UTILIZATION", context_chunking_policy="EQUAL_PROGRESS",
        dynamic_batch=trtllm_options.DynamicBatchOptions(
            enable_batch_size_tuning=True, enable_max_num_tokens_tuning=False, dynamic_batch_moving_average_window=64
        ),
    ),
    peft_cache=trtllm_options.PeftCacheOptions(lora_prefetch_dir="/adapters", host_cache_size=1 << 28, device_cache_percent=0.1),
    decoding=trtllm_options.DecodingOptions(mode="Eagle", medusa_choices=((0,), (0, 1)),
    eagle=trtllm_options.EagleOptions(eagle_choices=((0,),))), executor=trtllm_options.ExecutorOptions(normalize_log_probs=False,
    max_queue_size=8, gpu_weights_percent=0.5, enable_trt_overlap=True), perf_knobs=trtllm_options.PerfKnobOptions(multi_block_mode=False,
    enable_context_fmha_fp32_acc=True),
)  # fmt: skip


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FAKES))
    from tensorrt_llm.bindings import executor as module

    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def job(*, stops: tuple[int, ...] = (256, 258), min_new: int = 0, salt: str = "", **params: object) -> Job:
    return Job(id=3, input_ids=[1, 2], max_new=9, min_new=min_new, seed=5, stops=stops, params=SamplingParams(**params), salt=salt)  # type: ignore[arg-type]


def test_every_option_arrives_where_it_belongs(trt: Any) -> None:
    config = executor.config_of(ENGINE, TrtllmSpec(kv_tokens=4096, kv_bytes=1 << 33, max_batch_size=16, options=EVERYTHING))
    assert (config.max_batch_size, config.max_num_tokens, config.max_beam_width) == (16, 256, 1)
    assert (config.max_queue_size, config.normalize_log_probs, config.enable_chunked_context) == (8, False, True)
    cache, scheduler, decoding = config.kv_cache_config, config.scheduler_config, config.decoding_config
    assert (cache.max_tokens, cache.max_gpu_total_bytes, cache.host_cache_size) == (4096, 1 << 33, 1 << 30)
    assert cache.max_attention_window == [1024]
    assert cache.enable_block_reuse and cache.event_buffer_max_size > 0
    assert scheduler.capacity_scheduler_policy is trt.CapacitySchedulerPolicy.MAX_UTILIZATION
    assert scheduler.context_chunking_policy is trt.ContextChunkingPolicy.EQUAL_PROGRESS
    assert scheduler.dynamic_batch_config.dynamic_batch_moving_average_window == 64
    assert config.peft_cache_config.lora_prefetch_dir == "/adapters"
    assert (decoding.decoding_mode, decoding.medusa_choices, decoding.eagle_config.eagle_choices) == ("Eagle", [[0], [0, 1]], [[0]])
    assert config.parallel_config.communication_mode is trt.CommunicationMode.LEADER and config.parallel_config.device_ids == [0, 1]
    assert config.extended_runtime_perf_knob_config.multi_block_mode is False


def test_what_an_engine_was_not_built_for_is_refused_or_left_off(trt: Any, tmp_path: Path) -> None:
    plain = EngineDir(**{name: getattr(ENGINE, name) for name in ENGINE.__struct_fields__} | {"paged_context_fmha": False})
    config = executor.config_of(plain, TrtllmSpec())
    assert not config.kv_cache_config.enable_block_reuse and not config.enable_chunked_context
    with pytest.raises(ConfigError, match="chunked_context"):
        executor.config_of(plain, TrtllmSpec(options=TrtllmOptions(chunked_context=True)))
    with pytest.raises(ConfigError, match="tokenizer"):
        executor.config_of(ENGINE, TrtllmSpec(options=TrtllmOptions(guided_decoding="xgrammar")))


def test_a_request_says_everything_that_matters_and_defaults_nothing(trt: Any) -> None:
    request = executor.request_of(job(temperature=0.0), 320, TrtllmOptions())
    assert (request.input_token_ids, request.max_tokens, request.streaming, request.client_id) == ([1, 2], 9, True, 3)
    assert (request.end_id, request.pad_id, request.stop_words, request.cache_salt_id) == (256, 256, [[258]], None)
    assert request.output_config.exclude_input_from_output is True and request.output_config.return_log_probs is False
    sampling = request.sampling_config
    assert (sampling.beam_width, sampling.top_k, sampling.top_p, sampling.temperature, sampling.seed) == (1, 1, None, None, 5)
    # Both left out would mean greedy.
    free = executor.request_of(job(temperature=0.7), 320, TrtllmOptions()).sampling_config
    assert (free.top_k, free.top_p, free.temperature) == (0, 1.0, 0.7)
    assert (free.min_p, free.repetition_penalty, free.presence_penalty) == (None, None, None)
    full = executor.request_of(
        job(
            temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-0.5, logprobs=0
        ),
        320,
        TrtllmOptions(lora_task_id=7),
    )
    sampling = full.sampling_config
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (5, 0.9, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert full.output_config.return_log_probs is True and full.lora_config.task_id == 7


def test_stop_ids_salts_biases_and_guides(trt: Any) -> None:
    held = executor.request_of(job(min_new=4), 320, TrtllmOptions())
    assert held.sampling_config.min_tokens == 4 and held.stop_words is None, "only end_id is banned by min_tokens"
    free = executor.request_of(job(stops=()), 320, TrtllmOptions())
    assert free.end_id is None and free.stop_words is None
    salts = {executor.salt_id(salt) for salt in ("", "a", "b", "a")}
    assert len(salts) == 3 and None in salts and all(0 <= salt < 2**63 for salt in salts if salt is not None)
    assert free.bad_words is None
    assert executor.request_of(job(bad_words=((7,), (8, 9))), 320, TrtllmOptions()).bad_words == [[7], [8, 9]]
    with pytest.raises(Unsupported, match="bad_words"):
        llmapi.sampling_of(job(bad_words=((7,),)))
    bias = executor.request_of(job(logit_bias={7: -3.0}), 320, TrtllmOptions()).embedding_bias
    assert bias.shape == (320,) and bias[7] == -3.0 and bias.sum() == -3.0
    kinds = trt.GuidedDecodingParams.GuideType
    for guide, kind, text in (
        (GuideSpec(kind="json"), kinds.JSON, None),
        (GuideSpec(kind="json_schema", text="{}"), kinds.JSON_SCHEMA, "{}"),
        (GuideSpec(kind="regex", text="a+"), kinds.REGEX, "a+"),
        (GuideSpec(kind="choice", text='["a.b", "c|d"]'), kinds.REGEX, r"a\.b|c\|d"),
    ):
        made = executor.request_of(job(guide=guide), 320, TrtllmOptions()).guided_decoding_params
        assert (made.guide_type, made.guide) == (kind, text)


def test_the_llm_api_is_told_the_same(trt: Any) -> None:
    sampling = llmapi.sampling_of(job(temperature=0.7, min_p=0.1))
    assert (sampling.max_tokens, sampling.end_id, sampling.stop_token_ids, sampling.ignore_eos) == (9, 256, [258], False)
    assert (sampling.top_k, sampling.top_p, sampling.temperature, sampling.min_p, sampling.seed) == (0, 1.0, 0.7, 0.1, 5)
    assert sampling.detokenize is False and sampling.exclude_input_from_output is True
    greedy = llmapi.sampling_of(job(stops=(), temperature=0.0))
    assert (greedy.top_k, greedy.ignore_eos, greedy.stop_token_ids) == (1, True, None)


def test_models_that_it_cannot_run_are_refused_with_a_way_on(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, tp=1, pp=1)
    with pytest.raises(ArtifactError, match="is a checkpoint") as refused:
        open_model(checkpoint)
    assert "trireme build" in refused.value.hint
    with pytest.raises(ArtifactError, match="GGUF") as refused:
        open_model(tiny_gguf(tmp_path / "hf", tmp_path / "model.gguf"))
    assert "trireme convert" in refused.value.hint
    assert open_model(tmp_path / "hf").tokenizer_dir == tmp_path / "hf"


def deployment(trtllm: dict[str, object]) -> dict[str, object]:
    return {"models": [{"name": "m", "engine": "trtllm", "trtllm": trtllm}]}


def test_a_deployment_passes_options_through_and_names_the_nearest_of_an_unknown_one() -> None:
    given = {"kv_cache": {"free_gpu_memory_fraction": 0.8, "max_attention_window": [256]}, "peft_cache": {"max_adapter_size": 8}}
    spec = decided(load(deployment({"start_timeout_s": 5, **given})).config.models[0])[0].engine
    assert spec.options.kv_cache.max_attention_window == (256,) and spec.options.start_timeout_s == 5
    for path, wrong, nearest in (
        ("kv_cache", {"free_gpu_memory_fracton": 0.8}, "free_gpu_memory_fraction"),
        ("scheduler", {"capacity_policy": "STATIC_BATCH"}, "capacity_scheduler_policy"),
        ("peft_cache", {"lora_prefetch": "/a"}, "lora_prefetch_dir"),
    ):
        with pytest.raises(ConfigError, match=rf"models\[0\]\.trtllm\.{path}") as refused:
            load(deployment({path: wrong}))
        assert nearest in refused.value.hint
    with pytest.raises(ConfigError, match="fraction"):
        load(deployment({"kv_cache": {"free_gpu_memory_fraction": 1.5}}))


def test_ranks_name_the_nearest_too() -> None:
    asked = parse(["--engine", "trtllm", "--model", "/e", "--trtllm", '{"poll_ms": 5}', "--mpi-multiple"])
    assert asked.spec is not None and asked.spec.trtllm.options.poll_ms == 5
    with pytest.raises(ConfigError) as refused:
        parse(["--engine", "trtllm", "--model", "/e", "--trtllm", '{"kv_cache": {"host_cache": 5}}'])
    assert refused.value.hint == "did you mean host_cache_size?"
    with pytest.raises(ConfigError, match="not JSON"):
        parse(["--engine", "trtllm", "--model", "/e", "--trtllm", "poll_ms"])
