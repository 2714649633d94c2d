"""The arithmetic that engine and planner share, on numbers that can be done by hand."""

from __future__ import annotations

import msgspec
import pytest

from tests.reference.shards import weight_bytes
from workers.layout.memory import (
    GPU_RESERVE,
    HOST_CAP,
    blocks_that_fit,
    cache_budget,
    cache_room,
    check_room,
    frozen_bytes,
    kv_format,
    longest_sequence,
    step_bytes,
)  # fmt: skip
from workers.layout.sharding import parameters, shard_of
from workers.protocol.errors import ConfigError
from workers.protocol.specs import PLAIN, NormSpec, Parallel, PortableOptions, PortableSpec, Quant, quant_of, uniform_decoder

MODEL = uniform_decoder(
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
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(kv_tokens=513), "fp32", 0) == 33
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(kv_bytes=40 * BLOCK + 1), "fp32", 0) == 40
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp32", 7 * BLOCK) == 7
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp8", 7 * BLOCK) == 28
    with pytest.raises(ConfigError, match="hold no block"):
        blocks_that_fit(MODEL, SHARD, PortableSpec(), "fp32", BLOCK - 1)


@pytest.mark.parametrize(("kv_tokens", "kv_bytes", "max_seq_len"), [(100, 0, 0), (511 - 16, 0, 512), (0, 31 * BLOCK, 0), (16, 0, 17)])
def test_a_cache_that_cannot_hold_one_request_is_refused(kv_tokens: int, kv_bytes: int, max_seq_len: int) -> None:
    with pytest.raises(ConfigError, match="cannot hold one request") as caught:
        engine = PortableSpec(kv_tokens=kv_tokens, kv_bytes=kv_bytes, max_seq_len=max_seq_len)
        blocks_that_fit(MODEL, SHARD, engine, "fp32", 1 << 30)
    assert f"a request may have {max_seq_len or 512}" in caught.value.why
    assert blocks_that_fit(MODEL, SHARD, PortableSpec(kv_tokens=16, max_seq_len=16), "fp32", 0) == 1


@pytest.mark.parametrize(("asked", "longest"), [(0, 512), (1, 1), (512, 512), (513, None), (100_000, None)])
def test_a_sequence_is_never_longer_than_the_model_and_never_cut_in_silence(asked: int, longest: int | None) -> None:
    if longest is None:
        with pytest.raises(ConfigError, match="more than the model's context"):
            longest_sequence(MODEL, PortableSpec(max_seq_len=asked))
    else:
        assert longest_sequence(MODEL, PortableSpec(max_seq_len=asked)) == longest


def test_a_cache_has_to_fit_what_is_free() -> None:
    check_room(10, BLOCK, 10 * BLOCK)
    with pytest.raises(ConfigError, match="does not fit"):
        check_room(11, BLOCK, 11 * BLOCK - 1)


def room(engine: PortableSpec, *, free: int, total: int = 80 << 30, host_ranks: int) -> int:
    return cache_room(MODEL, SHARD, engine, free=free, total=total, host_ranks=host_ranks)


def test_budget_of_a_host_is_shared_and_capped() -> None:
    assert room(PortableSpec(), free=160 * BLOCK, host_ranks=4) == 40 * BLOCK
    assert cache_budget(PortableSpec(), 40 * BLOCK, 4) == 10 * BLOCK
    assert cache_budget(PortableSpec(), 1 << 38, 4) == HOST_CAP // 4


def test_budget_of_a_gpu_leaves_room_for_a_step() -> None:
    gpu = PortableSpec(device="cuda", dtype="bf16")
    wide = msgspec.structs.replace(gpu, max_num_tokens=512)
    assert 0 < step_bytes(MODEL, SHARD, gpu) < step_bytes(MODEL, SHARD, wide)
    assert room(gpu, free=80 << 30, host_ranks=8) == (78 << 30) - step_bytes(MODEL, SHARD, gpu)
    assert room(gpu, free=GPU_RESERVE, host_ranks=8) == 0
    assert cache_budget(gpu, 5 << 30, 8) == 5 << 30


def test_a_share_of_a_gpu_leaves_the_rest_unused() -> None:
    """What is in use and what the cache may take make the share together; a share that leaves less than the reserve changes nothing."""
    half = PortableSpec(device="cuda", dtype="bf16", options=PortableOptions(gpu_memory_utilization=0.5))
    used = 20 << 30
    assert room(half, free=(80 << 30) - used, host_ranks=1) + used + step_bytes(MODEL, SHARD, half) == 40 << 30
    nearly = msgspec.structs.replace(half, options=PortableOptions(gpu_memory_utilization=0.99))
    assert room(nearly, free=60 << 30, host_ranks=1) == room(PortableSpec(device="cuda", dtype="bf16"), free=60 << 30, host_ranks=1)


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


def test_norms_whose_weights_lack_one_are_in_fp32() -> None:
    gemma = msgspec.structs.replace(MODEL, norm=NormSpec(plus_one=True))
    for dtype, more in (("fp32", 0), ("bf16", 2 * (2 * MODEL.num_layers + 1) * MODEL.hidden_size)):
        engine = msgspec.convert({"device": "cuda", "dtype": dtype}, PortableSpec)
        assert frozen_bytes(gemma, Parallel(), 0, engine, PLAIN) - weight_bytes(gemma, Parallel(), 0, engine, PLAIN) == more


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
