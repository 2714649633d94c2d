"""The TensorRT-LLM backends call nothing that the published API does not have: every name in their source is looked up in the contract."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import workers.engines.trtllm
from tests.support.source_tree import imports
from tests.support.trtllm_contract import PYTHON, TRT, Reader
from workers.engines.trtllm.backend_choice import PROBES
from workers.protocol import trtllm_options

FOLDER = Path(workers.engines.trtllm.__file__).parent
BACKENDS = ("executor.py", "llmapi.py")

HEAD = "from tensorrt_llm.bindings import executor as trt\nfrom tensorrt_llm import llmapi\nimport tensorrt_llm\n"


def test_only_the_backends_touch_the_package() -> None:
    trees = {path.name: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}
    users = {name for name, tree in trees.items() if any(found.startswith("tensorrt_llm") for _, found in imports(name, tree))}
    assert users == set(BACKENDS)
    assert all(f"{module}.{name}" in PYTHON for module, name in PROBES.values()), "what tells the backends apart is not published"


@pytest.mark.parametrize("name", BACKENDS)
def test_every_use_is_in_the_contract(name: str) -> None:
    assert Reader((FOLDER / name).read_text()).faults == []


def test_the_reader_saw_the_calls_that_matter() -> None:
    """A reader that types nothing finds no fault."""
    read = [Reader((FOLDER / name).read_text()) for name in BACKENDS]
    seen = set().union(*(reader.seen for reader in read))
    assert len(seen) > 150
    for use in (
        "Executor(model_path=)", "Executor.enqueue_request(request=)", "Executor.await_responses(timeout=)", "Executor.cancel_request(id=)",
        "Executor.shutdown", "Executor.can_enqueue_requests", "Response.has_error", "Response.error_msg", "Response.request_id",
        "Result.output_token_ids", "Result.is_final", "Result.log_probs", "Request(cache_salt_id=)", "Request(end_id=)",
        "SamplingConfig(seed=)", "OutputConfig(exclude_input_from_output=)", "KvCacheConfig(host_cache_size=)",
        "ExecutorConfig(max_queue_size=)", "PeftCacheConfig(lora_prefetch_dir=)", "EagleConfig(eagle_choices=)",
        "IterationStats.iter", "KvCacheStats.free_num_blocks",
        "InflightBatchingStats.num_scheduled_requests", "kv_cache.KVCacheStoredBlockData.block_hash", "kv_cache.UniqueToken.token_id",
        "kv_cache.KVCacheRemovedData.block_hashes", "kv_cache.KVCacheEventManager.get_latest_events(timeout_ms=)",
    ):  # fmt: skip
        assert TRT + use in seen, use
    for use in (
        "tensorrt_llm.LLM(model=)", "tensorrt_llm.LLM(_mpi_session=)", "tensorrt_llm.LLM(attn_backend=)",
        "tensorrt_llm.LLM.generate_async(inputs=)", "tensorrt_llm.LLM.get_stats(timeout=)", "tensorrt_llm.SamplingParams(end_id=)",
        "tensorrt_llm.llmapi.RequestOutput.outputs",
        "tensorrt_llm.llmapi.CompletionOutput.token_ids", "tensorrt_llm.llmapi.RequestOutput.finished",
    ):  # fmt: skip
        assert use in seen, use


def test_what_rests_on_memory_alone_is_listed() -> None:
    """The contract marks these as not seen in any source; docs/tensorrt-llm.md lists them. A new one must be added there."""
    found = set().union(*(Reader((FOLDER / name).read_text()).unverified for name in BACKENDS))
    guided = "tensorrt_llm.llmapi.GuidedDecodingParams"
    assert found == {f"{guided}(json=)", f"{guided}(json_object=)", f"{guided}(regex=)", "tensorrt_llm.llmapi.RequestOutput.abort"}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("trt.Request(input_token_ids=[1], max_new_tokens=1)", "Request(max_new_tokens=)"),
        ("trt.Request(max_tokens=1)", "Request without input_token_ids"),
        ("trt.SamplingConfig(random_seed=1)", "SamplingConfig(random_seed=)"),
        ("trt.SamplingConfig(1)", "SamplingConfig: by keyword"),
        ("trt.ExecutorConfig(max_tokens=1)", "ExecutorConfig(max_tokens=)"),
        ("trt.BatchingType.CONTINUOUS", "BatchingType.CONTINUOUS"),
        ("trt.Executer", "executor.Executer"),
        ("def f(e: trt.Executor): e.abort()", "Executor.abort"),
        ("def f(e: trt.Executor): e.await_responses(timeout_ms=1)", "await_responses(timeout_ms=)"),
        ("def f(e: trt.Executor):\n  for r in e.await_responses(timeout=1): r.get_error_msg()", "Response.get_error_msg"),
        ("def f(e: trt.Executor):\n  x = [r.result.tokens for r in e.await_responses(timeout=1)]", "Result.tokens"),
        ("class A:\n  def __init__(self, e: trt.Executor): self._e = e\n  def g(self): self._e.stop()", "Executor.stop"),
        ("def f(s: trt.IterationStats): s.kv_cache_stats.free_blocks", "KvCacheStats.free_blocks"),
        ("def f(e: trt.kv_cache.KVCacheEvent): e.data.blocks", "before isinstance"),
        (
            "def f(e: trt.kv_cache.KVCacheEvent):\n  d = e.data\n  if isinstance(d, trt.kv_cache.KVCacheStoredData): d.hashes",
            "StoredData.hashes",
        ),
        ("def f(o: TrtllmOptions): trt.KvCacheConfig(**given(o.scheduler))", "KvCacheConfig(capacity_scheduler_policy=)"),
        ("def f(x): trt.KvCacheConfig(**x)", "KvCacheConfig(**?)"),
        ("trt.GuidedDecodingParams.GuideType.LARK", "GuideType.LARK"),
        ("tensorrt_llm.LLM(model='m', tp_size=2)", "LLM(tp_size=)"),
        ("tensorrt_llm.LLM(model='m', env_overrides=None)", "LLM(env_overrides=)"),
        ("llmapi.SchedulerConfig(waiting_queue_policy=1)", "SchedulerConfig(waiting_queue_policy=)"),
        ("def f(o: llmapi.RequestOutput): o.outputs[0].tokens", "CompletionOutput.tokens"),
        ("def f(o: llmapi.RequestOutput): getattr(o, 'kill', None)", "RequestOutput.kill"),
        ("from tensorrt_llm.llmapi import Engine", "llmapi.Engine"),
    ],
)
def test_a_planted_wrong_name_is_found(source: str, fault: str) -> None:
    found = Reader(HEAD + source).faults
    assert len(found) >= 1 and any(fault in line for line in found), found


def test_a_right_name_is_not_a_fault() -> None:
    assert Reader(HEAD + "def f(e: trt.Executor):\n  for r in e.await_responses(timeout=1): r.result.is_final").faults == []


#: Option that is turned into a member by its name -> the enum or the class of factories that must have it.
NAMED = {
    (trtllm_options.SchedulerOptions, "capacity_scheduler_policy"): "CapacitySchedulerPolicy",
    (trtllm_options.SchedulerOptions, "context_chunking_policy"): "ContextChunkingPolicy",
    (trtllm_options.DecodingOptions, "mode"): "DecodingMode",
}


@pytest.mark.parametrize(("option", "target"), NAMED.items())
def test_options_that_name_members_name_real_ones(option: tuple[type, str], target: str) -> None:
    entry = PYTHON[TRT + target]
    values = {value for kind in get_args(get_type_hints(option[0])[option[1]]) for value in get_args(kind)}
    assert values and values <= {*entry.get("members", ()), *entry.get("static_factories", ())}


def test_options_of_the_llm_api_take_its_literals() -> None:
    literals = PYTHON["tensorrt_llm.llmapi.llm_args.TorchLlmArgs"]["literals"]
    hints = get_type_hints(trtllm_options.LlmOptions)
    for name in ("allreduce_strategy", "sampler_type"):
        assert {value for kind in get_args(hints[name]) for value in get_args(kind)} == set(literals[name])
