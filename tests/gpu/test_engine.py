"""The portable engine on one GPU: the CPU's tokens by the margin rule, whatever way a sequence takes, and nothing left behind.

Needs a GPU. The default model is tested where it is in the cache.
"""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.reference.default_model import artifact
from tests.reference.engine import Stream, margin_violations, request, serve
from tests.support.families import CASES, FamilyCase, write_family
from tests.support.tiny_models import tiny_model
from workers.artifacts.convert import convert
from workers.engines.portable import PortableEngine, build
from workers.kernels import reference
from workers.kernels.linear import FP8_MAX
from workers.protocol.errors import ConfigError
from workers.protocol.messages import SamplingParams, Submit
from workers.protocol.specs import Parallel, PortableSpec, ReplicaSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
#: Gap of two log-probabilities below which another order of sums may choose the other token.
MARGIN = {"fp32": 1e-3, "bf16": 0.15}
#: The same where keys and values are rounded to FP8: what differs in a last bit before may differ by a sixteenth after.
FP8_CACHE_MARGIN = {"fp32": 0.03, "bf16": 0.15}

plain_store = reference.rope_store

TEXTS = (
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n", "Water boils at",
    "The three laws of motion say that", "Dear Sir or Madam,", "SELECT name FROM users WHERE", "A haiku about rivers:\n",
    "import numpy as np\n", "Breaking news:", "1, 1, 2, 3, 5, 8,", "A ship with three rows of oars is called",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), heads=6, kv_heads=2, hidden=192, ffn=256, vocab=331, layers=4, head_dim=32)


def engine_of(artifact: Path, device: str, dtype: str = "fp32", **settings: object) -> PortableEngine:
    limits = {"kv_tokens": 8192, "max_batch_size": 24, "max_num_tokens": 256} | settings
    spec = PortableSpec(device=device, dtype=dtype, **limits)  # type: ignore[arg-type]
    found = build(ReplicaSpec(name="r", model="m", artifact=str(artifact), engine=spec), None)
    assert isinstance(found, PortableEngine)
    return found


def greedy(prompts: list[list[int]], tokens: int, logprobs: int | None) -> list[Submit]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)
    return [request(prompt, params, id=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_greedy_tokens_are_the_cpus(folder: Path, dtype: str, logprobs: int | None) -> None:
    prompts = [[(7 * i + 3 * j) % 300 for j in range(3 + 17 * i)] for i in range(20)]
    expected = serve(engine_of(folder, "cpu"), greedy(prompts, 40, 2))
    device = engine_of(folder, "cuda", dtype)
    for turn in range(2):  # the second time from the prefix cache
        for a, b in zip(expected, serve(device, greedy(prompts, 40, logprobs)), strict=True):
            assert not margin_violations(a, b, MARGIN[dtype])
        assert turn == 0 or device.stats().prefix_hits_total > 0
    device.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_familys_greedy_tokens_are_the_cpus(case: FamilyCase, tmp_path: Path) -> None:
    """Contexts grow beyond windows and original lengths."""
    artifact = write_family(case, tmp_path)
    limits = {"max_seq_len": case.served, "kv_tokens": 1024, "max_num_tokens": 48}
    prompts = [[(7 * i + 3 * j) % 300 for j in range(11 + 17 * i)] for i in range(7)]
    expected = serve(engine_of(artifact, "cpu", **limits), greedy(prompts, 24, 2))
    device = engine_of(artifact, "cuda", **limits)
    for turn in range(2):  # the second time from the prefix cache
        for a, b in zip(expected, serve(device, greedy(prompts, 24, None)), strict=True):
            assert not margin_violations(a, b, MARGIN["fp32"])
        assert turn == 0 or device.stats().prefix_hits_total > 0
    device.close()


def rounding_store(qkv: Tensor, cache: Tensor, rope: Tensor, layout: reference.AttentionLayout, norm: Tensor | None, eps: float) -> None:
    """The CPU's own, whose keys and values are rounded as an FP8 cache keeps them."""
    plain_store(qkv, cache, rope, layout, norm, eps)
    lines = cache.view(-1, *cache.shape[2:])
    kept = lines.index_select(0, layout.cache_indices).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(cache.dtype)
    lines.index_copy_(0, layout.cache_indices, kept)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_fp8_kv_cache_gives_the_tokens_of_a_cpu_that_rounds_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    fp8_cached = convert(folder, tmp_path / "fp8_cached", parallel=Parallel(), fp8_kv_cache=True)
    prompts = [[(7 * i + 3 * j) % 300 for j in range(3 + 17 * i)] for i in range(20)]
    exact = serve(engine_of(fp8_cached, "cpu"), greedy(prompts, 40, 2))
    monkeypatch.setattr(reference, "rope_store", rounding_store)
    rounded = serve(engine_of(fp8_cached, "cpu"), greedy(prompts, 40, 2))
    margin = FP8_CACHE_MARGIN[dtype]
    assert any(margin_violations(a, b, margin) for a, b in zip(rounded, exact, strict=True)), "the margin would hide a plain cache"
    device = engine_of(fp8_cached, "cuda", dtype)
    for turn in range(2):  # the second time from the prefix cache
        for a, b in zip(rounded, serve(device, greedy(prompts, 40, None)), strict=True):
            assert not margin_violations(a, b, margin)
        assert turn == 0 or device.stats().prefix_hits_total > 0
    device.close()


def test_every_way_to_sample_says_what_the_cpu_says(folder: Path) -> None:
    kinds = (
        SamplingParams(temperature=0.9, seed=1, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=2, top_p=0.9, top_k=30, max_tokens=20, logprobs=1),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=20),
        SamplingParams(temperature=0.0, max_tokens=10, prompt_logprobs=2, logprobs=2),
        SamplingParams(temperature=0.7, seed=3, min_p=0.1, min_tokens=4, max_tokens=12),
    )
    requests = [request([(5 * i + j) % 300 for j in range(4 + 9 * i)], kinds[i % len(kinds)], id=i) for i in range(20)]
    device = engine_of(folder, "cuda")
    same = 0
    for a, b in zip(serve(engine_of(folder, "cpu"), requests), serve(device, requests), strict=True):
        same += a.tokens == b.tokens
        if a.prompt_logprobs is not None and b.prompt_logprobs is not None:
            assert all(abs((x.logprob or 0) - (y.logprob or 0)) < 1e-3 for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True))
    print(f"{same} of {len(requests)} streams are equal to the token")
    assert same >= len(requests) - 2, "rounding may part a stream, not several"
    device.close()


def allocated() -> int:
    """Bytes of GPU memory in use, without what cuBLAS keeps for each stream that it has seen."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def soak(engine: PortableEngine, count: int, seed: int) -> None:
    """``count`` random requests, a few dozen at a time, one in five cancelled."""
    draw, live, sent = random.Random(seed), {}, 0
    while live or sent < count:
        while sent < count and len(live) < 40:
            params = SamplingParams(
                temperature=draw.choice([0.0, 1.0]),
                seed=sent,
                max_tokens=draw.randint(1, 40),
                top_p=draw.choice([1.0, 1.0, 1.0, 0.9]),
                ignore_eos=draw.random() < 0.5,
            )
            engine.submit(sent, request([draw.randrange(300) for _ in range(draw.randint(1, 200))], params, id=sent))
            live[sent] = Stream()
            sent += 1
        for emission in engine.step():
            live[emission.id].tokens += emission.tokens
            if emission.end is not None:
                del live[emission.id]
        if live and draw.random() < 0.2:
            victim = draw.choice(list(live))
            engine.cancel(victim)
            del live[victim]
    while engine.busy():
        engine.step()


def soaked(folder: Path, count: int, seconds: float) -> tuple[int, float]:
    """At least ``count`` requests and ``seconds`` of them leave no block, no byte of the GPU's memory and no graph; what it came to."""
    before = allocated()
    engine = engine_of(folder, "cuda", "bf16")
    soak(engine, 200, seed=1)
    torch.cuda.synchronize()
    held, begin, done = torch.cuda.memory_allocated(), time.monotonic(), 0
    while done < count or time.monotonic() - begin < seconds:
        soak(engine, 500, seed=2 + done)
        done += 500
        stats = engine.stats()
        assert (stats.free_blocks, stats.running, stats.waiting) == (engine.capacity.num_blocks, 0, 0)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held, f"memory grows with requests: after {done}"
    took = time.monotonic() - begin
    engine.close()
    del engine
    assert allocated() <= before, "graphs or caches are left behind"
    return done, took


def test_random_requests_leave_no_block_no_byte_and_no_graph(folder: Path) -> None:
    soaked(folder, 1500, 0.0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_six_minutes_of_random_requests_leave_nothing(folder: Path) -> None:
    done, took = soaked(folder, 20_000, 360.0)
    print(f"{done} random requests in {took:.0f} s: no block, no byte and no graph left")


def test_what_a_gpu_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fixed_shape"):
        engine_of(folder, "cuda", fixed_shape=True)


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_default_models_greedy_tokens_are_the_cpus(dtype: str) -> None:
    folder = artifact()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    expected = serve(engine_of(folder, "cpu", max_seq_len=1024), greedy(prompts, 32, 2))
    device = engine_of(folder, "cuda", dtype, max_seq_len=1024)
    found = serve(device, greedy(prompts, 32, None))
    parted = [margin_violations(a, b, MARGIN[dtype]) for a, b in zip(expected, found, strict=True)]
    assert not any(parted), parted
    device.close()
