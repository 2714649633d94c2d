"""A decoder stage against transformers, and the kernels against their plain definitions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.shards import make_stage, whole_weights
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact
from workers.kernels.reference import attention_layout, paged_attention, rms_norm, rotate
from workers.models.decoder import DecoderStage
from workers.models.layers import FIXED_ROWS, Linear
from workers.runner.kv_cache import KvCache

warnings.filterwarnings("ignore", category=UserWarning)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def reference_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids[None]).logits[0]


def tables(count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).permutation(count).astype(np.int32)[None, :]


def run(stage: DecoderStage, cache: KvCache, ids: torch.Tensor, chunks: list[int], *, grouped: bool = True) -> torch.Tensor:
    """Logits of one sequence computed in ``chunks``."""
    found, start = [], 0
    with torch.inference_mode():
        for size in chunks:
            layout = attention_layout(np.array([start], np.int32), np.array([size], np.int32), tables(), cache.block_size, grouped=grouped)
            found.append(stage.logits(stage.forward(stage.embed(ids[start : start + size]), layout, cache.layers)))
            start += size
    return torch.cat(found)


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"tied": False, "vocab": 321}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_every_architecture_is_what_transformers_computes(tmp_path: Path, architecture: str, extra: dict) -> None:
    folder = tiny_model(tmp_path, architecture=architecture, **extra)
    model = open_artifact(folder).model
    stage = make_stage(model, whole_weights(folder))
    ids = torch.randint(0, model.vocab_size, (150,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(folder, ids)
    for chunks in ([150], [1] * 150, [64, 1, 1, 20, 64]):
        cache = KvCache(model, stage.shard, blocks=32, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
        found = run(stage, cache, ids, chunks)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), chunks[:3]
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_fixed_shapes_make_a_tokens_bits_independent_of_its_chunk(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, heads=9, kv_heads=3, head_dim=16, hidden=144, ffn=200)
    model = open_artifact(folder).model
    stage = make_stage(model, whole_weights(folder), fixed=True)
    ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1))
    found = []
    for chunks in ([150], [1] * 150, [64, 1, 1, 20, 64]):
        cache = KvCache(model, stage.shard, blocks=32, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
        found.append(run(stage, cache, ids, chunks, grouped=False))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0] - reference_logits(folder, ids)).abs().max() < 1e-3


def test_attention_of_a_mixed_batch_is_softmax_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = np.array([0, 5, 300, 31, 0, 17, 200], np.int32)
    lengths = np.array([9, 1, 1, 1, 1, 40, 1], np.int32)
    heads, kv, dim, size = 6, 2, 8, 16
    total, width = int(lengths.sum()), 384 // size
    layout_tables = np.random.default_rng(1).permutation(7 * width).astype(np.int32).reshape(7, width)
    cache = torch.randn(7 * width, size, 2 * kv, dim, generator=generator)
    query = torch.randn(total, heads, dim, generator=generator)
    flat = cache.view(-1, 2 * kv, dim)
    for grouped in (True, False):
        layout = attention_layout(starts, lengths, layout_tables, size, grouped=grouped)
        found = paged_attention(query, cache, layout)
        token = 0
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for position in range(start, start + length):
                places = [int(layout_tables[row, p // size]) * size + p % size for p in range(position + 1)]
                assert layout.cache_indices[token] == places[-1] and layout.positions[token] == position
                read = flat[places].double()
                keys, values = (x.repeat_interleave(heads // kv, 1) for x in (read[:, :kv], read[:, kv:]))
                scores = torch.einsum("hd,chd->hc", query[token].double(), keys) / dim**0.5
                expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
                torch.testing.assert_close(found[token].view(heads, dim).double(), expected, rtol=1e-4, atol=1e-5)
                token += 1


def test_rotation_is_by_halves() -> None:
    x = torch.randn(3, 2, 8)
    angle = torch.rand(3, 4)
    cosine = torch.cat((angle.cos(), angle.cos()), -1).unsqueeze(1)
    sine = torch.cat((-angle.sin(), angle.sin()), -1).unsqueeze(1)
    low, high = x[..., :4].clone(), x[..., 4:].clone()
    rotate(x, cosine, sine)
    c, s = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    torch.testing.assert_close(x, torch.cat((low * c - high * s, high * c + low * s), -1))


def test_norm_is_root_mean_square() -> None:
    x, weight = torch.randn(5, 32) * 30, torch.rand(32)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, FIXED_ROWS, 40])
def test_a_frozen_linear_is_the_product(rows: int) -> None:
    weight, bias = torch.randint(-3, 4, (33, 20)).float(), torch.arange(33.0)
    x = torch.randint(-3, 4, (rows, 20)).float()
    for fixed in (False, True):
        linear = Linear(33, 20, bias=True, dtype=torch.float32, device=torch.device("cpu"))
        linear.parts()["weight"].copy_(weight)
        linear.parts()["bias"].copy_(bias)
        linear.freeze(fixed_rows=fixed)
        assert torch.equal(linear(x), x @ weight.T + bias)
