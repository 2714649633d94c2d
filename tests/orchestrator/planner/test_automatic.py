"""Automatic settings on pretend hosts: what is chosen, why, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.deployment_file import load
from orchestrator.config.engine_settings import StepLimits
from orchestrator.planner.automatic import (
    CPU_LIMITS,
    GPU_LIMITS,
    LEAST_CACHE_TOKENS,
    ClusterHardware,
    GangDecision,
    ModelDescription,
    NodeHardware,
)
from orchestrator.planner.known_models import SHAPES
from orchestrator.planner.planner import Subject, ranks_memory
from tests.support.examples import examples
from tests.support.hardware import EIGHT_LARGE, GIB, NO_GPU, ONE_SMALL, decided, gpu, host
from workers.layout.sharding import parameters
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.specs import DTYPE_BYTES, PLAIN, Parallel, quant_of

SMALL, EIGHT_B, BIG = "smollm2-135m-instruct", "llama-3.1-8b", "llama-3.1-70b"
OLD = host(gpu(16, "Tesla T4", (7, 5)))
FAST_CPU = host(bf16=True, fast_bf16=True)


def described(name: str, dtype: str = "bf16", **more: Any) -> ModelDescription:
    return ModelDescription(shape=SHAPES[name], dtype=dtype, **more)  # type: ignore[arg-type]


def decide_all(name: str, hardware: ClusterHardware, stored: str = "bf16", /, **model: Any) -> list[GangDecision]:
    config = load({"models": [{"name": name} | model]}).config.models[0]
    return decided(config, hardware, described(name, stored))


def decide_one(name: str, hardware: ClusterHardware, stored: str = "bf16", /, **model: Any) -> GangDecision:
    (found,) = decide_all(name, hardware, stored, **model)
    return found


def limits(found: GangDecision) -> StepLimits:
    return StepLimits(max_batch_size=found.engine.max_batch_size, max_num_tokens=found.engine.max_num_tokens)


def test_without_a_gpu_all_is_as_it_always_was() -> None:
    found = decide_one(SMALL, NO_GPU, "fp32")
    assert (found.engine.device, found.engine.dtype, found.parallel) == ("cpu", "fp32", Parallel())
    assert (limits(found), CPU_LIMITS) == (CPU_LIMITS, StepLimits(max_batch_size=64, max_num_tokens=256))
    assert found.chosen[0] == "device cpu (no GPU was found)"


@pytest.mark.parametrize(
    ("name", "hardware", "tp", "steps"),
    [
        (SMALL, ONE_SMALL, 1, GPU_LIMITS[1]),
        (EIGHT_B, ONE_SMALL, 1, GPU_LIMITS[1]),
        (EIGHT_B, EIGHT_LARGE, 1, GPU_LIMITS[0]),
        (EIGHT_B, host(*[gpu(16)] * 2), 2, GPU_LIMITS[1]),
        (BIG, EIGHT_LARGE, 2, GPU_LIMITS[0]),
        (BIG, host(*[gpu(24)] * 8), 8, GPU_LIMITS[1]),
        (BIG, host(*[gpu(80)] * 8, nodes=2), 2, GPU_LIMITS[0]),
        ("llama-3.1-405b", host(*[gpu(141)] * 8), 8, GPU_LIMITS[0]),
    ],
)
def test_a_gpu_host_is_used_with_as_few_ranks_as_hold_the_model(name: str, hardware: ClusterHardware, tp: int, steps: StepLimits) -> None:
    found = decide_one(name, hardware)
    assert (found.engine.device, found.engine.dtype, found.parallel, limits(found)) == ("cuda", "bf16", Parallel(tp=tp), steps)
    assert found.chosen[0].startswith("device cuda (") and "NVIDIA Test GPU" in found.chosen[0]
    assert found.cache >= min(LEAST_CACHE_TOKENS, SHAPES[name].max_position)
    # A larger layout is said, with the reason; the usual one is not worth a word.
    assert [text for text in found.chosen if text.startswith("tp_size")] == (
        [] if tp == 1 else [text for text in found.chosen if text.startswith(f"tp_size {tp} (on one GPU: ")]
    )
    if tp > 1:  # the next smaller layout would not have held it
        subject = Subject(name=name, model=SHAPES[name], quant=PLAIN, engine=found.engine, gangs=())
        smaller = msgspec.structs.replace(subject, engine=msgspec.structs.replace(found.engine, max_batch_size=64, max_num_tokens=512))
        try:
            memory = ranks_memory(smaller, Parallel(tp=tp // 2), hardware.smallest_gpu, gang_ranks=tp // 2, node_ranks=1)
        except ConfigError:
            return
        assert min(rank.kv_tokens for rank in memory) < LEAST_CACHE_TOKENS


def test_steps_shrink_before_ranks_are_added() -> None:
    """8 billion parameters in bf16 leave a GPU of 19 GiB no room for wide steps."""
    found = decide_one(EIGHT_B, host(*[gpu(19)] * 2))
    assert found.parallel == Parallel() and limits(found) in GPU_LIMITS[2:]


def test_an_old_gpu_is_not_used_and_said() -> None:
    assert decide_one(SMALL, OLD).chosen[0] == "device cpu (Tesla T4 has compute capability 7.5, 8.0 is needed)"
    with pytest.raises(EnvironmentFault, match=r"no GPU to use: Tesla T4 has compute capability 7\.5"):
        decide_one(SMALL, OLD, device="cuda")


def test_a_gpu_that_torch_cannot_use_is_named() -> None:
    hidden = host(gpu_fault="torch 2.13.0+cpu is a build without CUDA")
    assert "a build without CUDA" in decide_one(SMALL, hidden).chosen[0]
    with pytest.raises(EnvironmentFault, match="a build without CUDA") as caught:
        decide_one(SMALL, hidden, device="cuda")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("stored", "hardware", "dtype"),
    [
        ("bf16", NO_GPU, "fp32"), ("fp16", NO_GPU, "fp32"), ("fp32", NO_GPU, "fp32"),
        ("bf16", FAST_CPU, "bf16"), ("fp16", FAST_CPU, "fp32"), ("fp32", FAST_CPU, "fp32"), ("bf16", host(bf16=True), "fp32"),
        ("bf16", ONE_SMALL, "bf16"), ("fp16", ONE_SMALL, "fp16"), ("fp32", ONE_SMALL, "bf16"),
    ],
)  # fmt: skip
def test_the_number_format_is_the_models_own_where_the_device_computes_in_it(stored: str, hardware: ClusterHardware, dtype: str) -> None:
    found = decide_one(SMALL, hardware, stored)
    assert found.engine.dtype == dtype
    assert any(text.startswith(f"dtype {dtype} (") for text in found.chosen)


def test_fp8_weights_are_not_computed_beside_fp16() -> None:
    model = load({"models": [{"name": SMALL}]}).config.models[0]
    (found,) = decided(model, EIGHT_LARGE, described(SMALL, "fp16", quant=quant_of("fp8")))
    assert found.engine.dtype == "bf16"


def test_what_is_asked_for_is_never_changed_and_not_explained() -> None:
    asked = {"device": "cuda", "dtype": "fp16", "max_batch_size": 7, "max_num_tokens": 77, "tp_size": 4}
    found = decide_one(SMALL, EIGHT_LARGE, **asked)
    engine = found.engine
    assert (engine.device, engine.dtype, engine.max_batch_size, engine.max_num_tokens, found.parallel.tp) == ("cuda", "fp16", 7, 77, 4)
    assert found.chosen == ()


@settings(max_examples=examples(30), deadline=None)
@given(
    batch=st.none() | st.integers(1, 4096), tokens=st.none() | st.integers(1, 20000), on=st.sampled_from([NO_GPU, ONE_SMALL, EIGHT_LARGE])
)
def test_half_given_limits_always_make_a_step(batch: int | None, tokens: int | None, on: ClusterHardware) -> None:
    given_ = {"max_batch_size": batch, "max_num_tokens": tokens}
    model = {key: value for key, value in given_.items() if value is not None}
    if batch is not None and tokens is not None and tokens < batch:
        with pytest.raises(ConfigError, match="is below max_batch_size"):
            decide_one(SMALL, on, **model)
        return
    found = limits(decide_one(SMALL, on, max_seq_len=512, **model))
    assert 1 <= found.max_batch_size <= found.max_num_tokens
    assert batch in (None, found.max_batch_size) and tokens in (None, found.max_num_tokens)


def test_fixed_shape_and_odd_heads_stay_on_the_cpu() -> None:
    assert decide_one(SMALL, EIGHT_LARGE, fixed_shape=True).chosen[0] == "device cpu (fixed_shape is for CPUs)"
    odd = msgspec.structs.replace(SHAPES[SMALL], head_dim=80)
    (found,) = decided(load({"models": [{"name": SMALL}]}).config.models[0], EIGHT_LARGE, ModelDescription(shape=odd))
    assert found.engine.device == "cpu" and "heads of 80" in found.chosen[0]


@pytest.mark.parametrize(
    ("hardware", "model", "kind", "told"),
    [
        (NO_GPU, {"device": "cuda"}, EnvironmentFault, "no GPU to use: no GPU was found"),
        (NO_GPU, {"dtype": "fp16"}, ConfigError, "fp16 is not computed on a CPU"),
        (NO_GPU, {"dtype": "bf16"}, ConfigError, "this CPU has no bfloat16 arithmetic"),
        (NO_GPU, {"max_seq_len": 100_000}, ConfigError, "more than the model's context: the model has 8192 positions"),
        (ONE_SMALL, {"max_seq_len": 8193}, ConfigError, "more than the model's context"),
        (NO_GPU, {"kv_tokens": 100}, ConfigError, "kv_tokens: 100 cannot hold one request"),
        (ONE_SMALL, {"kv_bytes": 1 << 20}, ConfigError, "cannot hold one request"),
        (NO_GPU, {"kv_tokens": 1 << 30}, ConfigError, "no room for its cache"),
        (ONE_SMALL, {"kv_tokens": 1 << 30}, ConfigError, "no room for its cache"),
        (ONE_SMALL, {"tp_size": 2}, EnvironmentFault, "2 GPUs are needed, 1 is here"),
        (ONE_SMALL, {"replicas": 2}, EnvironmentFault, "2 GPUs are needed, 1 is here"),
        (EIGHT_LARGE, {"tp_size": 10}, ConfigError, "more than the model's 9 query heads"),
        (NO_GPU, {"tp_size": 10}, ConfigError, "more than the model's 9 query heads"),
        (host(gpu(3)), {"kv_tokens": 8192}, ConfigError, "does not fit"),
        (host(memory=1 << 28), {}, ConfigError, "does not fit on its share of the host"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line(hardware: ClusterHardware, model: dict[str, Any], kind: type, told: str) -> None:
    with pytest.raises(kind) as caught:
        decide_one(SMALL, hardware, **model)
    assert told in str(caught.value) and caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_model_that_is_too_large_is_refused_with_what_would_hold_it() -> None:
    with pytest.raises(ConfigError, match=r"its weights take 141\.1 GB") as caught:
        decide_one(BIG, ONE_SMALL)
    assert "use 8 such GPUs (-tp 8)" in caught.value.hint


def test_replicas_share_the_gpus_of_a_host() -> None:
    """Each of two replicas may take half of the GPUs, and no more."""
    found = decide_all(BIG, host(*[gpu(48)] * 8), replicas=2)
    assert [each.parallel for each in found] == [Parallel(tp=4)] * 2
    with pytest.raises(ConfigError, match="tp=2"):
        decide_all(BIG, host(*[gpu(48)] * 4), replicas=2)


def test_replicas_on_several_devices_are_decided_apart() -> None:
    cpu, cuda = decide_all(SMALL, EIGHT_LARGE, replicas=[{"name": "a", "device": "cpu"}, {"name": "b"}])
    assert (cpu.engine.device, cpu.engine.dtype, limits(cpu)) == ("cpu", "fp32", CPU_LIMITS)
    assert (cuda.engine.device, cuda.engine.dtype, limits(cuda)) == ("cuda", "bf16", GPU_LIMITS[0])


def test_a_cluster_that_may_grow_refuses_nothing_for_want_of_gpus() -> None:
    empty = host(grows=True)
    assert decide_one(SMALL, empty).engine.device == "cpu"
    waiting = decide_one(BIG, empty, device="cuda", tp_size=8)
    assert (waiting.engine.device, waiting.engine.dtype, waiting.parallel, waiting.cache) == ("cuda", "bf16", Parallel(tp=8), 0)
    some = host(*[gpu(80)] * 2, grows=True)
    assert [each.parallel.tp for each in decide_all(BIG, some, replicas=3)] == [2, 2, 2]


def test_the_smallest_gpu_of_a_cluster_decides() -> None:
    mixed = ClusterHardware(nodes=(NodeHardware(gpus=(gpu(80),) * 4, memory=GIB), NodeHardware(gpus=(gpu(24),) * 4, memory=GIB)))
    found = decide_one(EIGHT_B, mixed)
    assert limits(found) == GPU_LIMITS[1] and "4 x NVIDIA Test GPU" not in found.chosen[0] and "8 x NVIDIA Test GPU" in found.chosen[0]


def test_a_share_of_the_gpu_is_all_that_is_planned_with() -> None:
    whole, half = decide_one(EIGHT_B, host(gpu(80))), decide_one(EIGHT_B, host(gpu(80)), gpu_memory_utilization=0.5)
    shape = SHAPES[EIGHT_B]
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES["bf16"]
    # Half of 80 GiB stay unused in place of the reserve of 2 GiB.
    assert abs((whole.cache - half.cache) * token - 38 * GIB) <= 32 * token


def test_an_engine_of_tensorrt_llm_runs_as_it_was_built() -> None:
    model = load({"models": [{"name": "e", "engine": "trtllm"}]}).config.models[0]
    built = ModelDescription(built=StepLimits(max_batch_size=32, max_num_tokens=4096), layout=Parallel(tp=2, pp=2))
    (found,) = decided(model, EIGHT_LARGE, built)
    assert (found.engine.device, found.parallel, limits(found)) == (
        "cuda",
        Parallel(tp=2, pp=2),
        StepLimits(max_batch_size=32, max_num_tokens=4096),
    )


def test_the_fake_engine_runs_anywhere_and_needs_no_word() -> None:
    model = load({"models": [{"name": "f", "engine": "fake", "tp_size": 4}]}).config.models[0]
    (found,) = decided(model, EIGHT_LARGE)
    assert (found.engine.device, found.parallel, limits(found), found.chosen) == ("cpu", Parallel(tp=4), CPU_LIMITS, ())


def test_weights_that_are_dequantized_are_named_with_their_price() -> None:
    stored = described(SMALL, dequantized="awq (4 bits, groups of 128)", stored_bytes=parameters(SHAPES[SMALL]) // 2)
    (found,) = decided(load({"models": [{"name": SMALL}]}).config.models[0], EIGHT_LARGE, stored)
    assert "weights dequantized from awq (4 bits, groups of 128) to bf16 (4.0 times their size in the file)" in found.chosen
