"""The arithmetic that engine and planner share, on numbers that can be done by hand."""

from __future__ import annotations

import msgspec
import pytest

from tests.reference.shards import weight_bytes
from workers.layout.memory import GPU_RESERVE, HOST_CAP, blocks_that_fit, cache_budget, frozen_bytes, kv_format, step_bytes
from workers.layout.sharding import parameters, shard_of
from workers.protocol.errors import ConfigError
from workers.protocol.specs import PLAIN, ModelSpec, Parallel, PortableSpec, Quant, quant_of

MODEL = ModelSpec(
    architecture="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=300,
    max_position=512,
)
SHARD = shard_of(MODEL, Parallel(tp=2, pp=2), 0)
#: Two layers, 16 tokens, keys and values of two heads of 8, four bytes.
BLOCK = 2 * 16 * 2 * 2 * 8 * 4


def test_blocks_as_asked_for_or_as_many_as_fit() -> None:
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(kv_tokens=33), "fp32", 0) == 3
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(kv_bytes=10 * BLOCK + 1), "fp32", 0) == 10
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp32", 7 * BLOCK) == 7
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp8", 7 * BLOCK) == 28
    with pytest.raises(ConfigError, match="hold no block"):
        blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp32", BLOCK - 1)


def test_budget_of_a_host_is_shared_and_capped() -> None:
    assert cache_budget(MODEL, SHARD, PortableSpec(), free=160 * BLOCK, host_ranks=4) == 10 * BLOCK
    assert cache_budget(MODEL, SHARD, PortableSpec(), free=1 << 40, host_ranks=4) == HOST_CAP // 4


def test_budget_of_a_gpu_leaves_room_for_a_step() -> None:
    gpu = PortableSpec(device="cuda", dtype="bf16")
    wide = msgspec.structs.replace(gpu, max_num_tokens=512)
    assert 0 < step_bytes(MODEL, SHARD, gpu) < step_bytes(MODEL, SHARD, wide)
    assert cache_budget(MODEL, SHARD, gpu, free=80 << 30, host_ranks=8) == (78 << 30) - step_bytes(MODEL, SHARD, gpu)
    assert cache_budget(MODEL, SHARD, gpu, free=GPU_RESERVE, host_ranks=8) == 0


def test_weights_of_all_ranks_are_the_model() -> None:
    bf16 = PortableSpec(device="cuda", dtype="bf16")
    assert weight_bytes(MODEL, Parallel(), 0, bf16, PLAIN) == 2 * parameters(MODEL)
    halves = [weight_bytes(MODEL, Parallel(pp=2), rank, bf16, PLAIN) for rank in range(2)]
    assert sum(halves) == 2 * parameters(MODEL)


@pytest.mark.parametrize(("device", "name", "factor"), [("cpu", "fp8", 4), ("cuda", "fp8", 1), ("cpu", "int8", 1), ("cuda", "int8", 1)])
def test_a_second_form_is_counted(device: str, name: str, factor: int) -> None:
    """FP8 weights become plain ones on a CPU; everything else keeps its size."""
    engine = msgspec.convert({"device": device, "dtype": "fp32"}, PortableSpec)
    quant = quant_of("fp8" if name == "fp8" else "int8")
    layers = sum(tensor for tensor in _linear_elements())
    more = frozen_bytes(MODEL, Parallel(), 0, engine, quant) - weight_bytes(MODEL, Parallel(), 0, engine, quant)
    assert more == (factor - 1) * layers


def _linear_elements() -> list[int]:
    each = MODEL.hidden_size * (2 * MODEL.num_heads + 2 * MODEL.num_kv_heads) * MODEL.head_dim + 3 * MODEL.hidden_size * 128
    return [each] * MODEL.num_layers


def test_a_tied_table_is_there_twice_on_a_cpu_only() -> None:
    tied = msgspec.structs.replace(MODEL, tied_embeddings=True)
    table = MODEL.vocab_size * MODEL.hidden_size * 4
    for device, layout, more in (("cpu", Parallel(), table), ("cpu", Parallel(pp=2), 0), ("cuda", Parallel(), 0)):
        engine = msgspec.convert({"device": device}, PortableSpec)
        assert frozen_bytes(tied, layout, 0, engine, PLAIN) - weight_bytes(tied, layout, 0, engine, PLAIN) == more


def test_cache_format() -> None:
    fp8 = Quant(kv_cache_quant_algo="FP8")
    assert kv_format(PortableSpec(dtype="bf16", device="cuda"), fp8) == "fp8"
    assert kv_format(PortableSpec(dtype="bf16"), fp8) == "bf16"
    assert kv_format(PortableSpec(dtype="bf16", device="cuda"), PLAIN) == "bf16"
