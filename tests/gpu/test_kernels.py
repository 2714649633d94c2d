"""Every Triton kernel against float64 over random shapes, on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.gpu.kernel_cases import BOUNDS, FP8, attention, error, make_case, random_cache, turned
from tests.reference.shards import make_stage, random_weights
from tests.support.fake_device import FakeDevice
from workers.distributed.group import Waiter
from workers.kernels import step_layout as layout
from workers.kernels.linear import to_fp8
from workers.kernels.reference import attention_layout
from workers.kernels.step_layout import (
    NUMBER_MASK,
    Heads,
    LayoutShape,
    Paging,
    Rings,
    SlotState,
    decode_shape,
    fill_layout,
    step_shape,
    view_layout,
)
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import Activation, uniform_decoder
from workers.runner.device import CudaDevice
from workers.runner.host_device_rings import Completions, Submissions
from workers.runner.kv_cache import KvCache
from workers.runner.slot_updates import SlotUpdates
from workers.sampling.definition import choose, gumbel, noise_bits, seed_keys

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: triton is not installed (it comes with torch for CUDA)", allow_module_level=True)
GPU = torch.cuda.is_available()
if not GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the Triton kernels are not tested: without a GPU, Triton's interpreter needs numpy below 2.4", allow_module_level=True)
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from workers.kernels import gpu  # noqa: E402
from workers.kernels.step_ends import best_candidates, choose_tokens, merge_candidates, resolve_placeholders, take_submission  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16
#: The interpreter is slow, and has no products of bf16.
PRODUCTS, HALF = (DTYPES, BF16) if GPU else ([torch.float32], torch.float16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel is given to write is full of NaN."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poison(*args: object, plain=plain, **kwargs: object) -> torch.Tensor:  # type: ignore[no-untyped-def]
            made = plain(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(0x6BAD6BAD)

        monkeypatch.setattr(torch, name, poison)
    yield


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for a program, even one with nothing to do."""
    if not GPU:
        monkeypatch.setattr(layout, "SPLIT_PROGRAMS", 24)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


#: (heads, head dimension, block size, rows of (start, length)): decodes first, then chunks.
STEPS = [
    (Heads(8, 2), 64, 16, [(0, 1), (5, 1), (16, 1), (700, 1), (300, 1)]),
    (Heads(9, 3), 16, 16, [(31, 1), (400, 1), (0, 40), (37, 1), (250, 23)]),
    (Heads(2, 1), 128, 32, [(90, 1), (0, 130), (129, 70)]),
    (Heads(6, 6), 32, 64, [(280, 1), (63, 1), (64, 1), (50, 66)]),
    (Heads(32, 1), 32, 16, [(270, 1), (10, 9)]),
    (Heads(7, 1), 16, 16, [(0, 19), (3, 50)]),
]
if GPU:
    STEPS += [
        (Heads(32, 8), 128, 16, [(n, 1) for n in (0, 15, 16, 399, 4000, 9000, 127, 128, 255)]),
        (Heads(32, 8), 128, 16, [(700, 1), (0, 1000), (333, 512), (4096, 130)]),
        (Heads(5, 1), 256, 64, [(1000, 1), (20, 300)]),
    ]


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("step", STEPS)
def test_attention(step: tuple[Heads, int, int, list[tuple[int, int]]], dtype: torch.dtype) -> None:
    heads, dim, block, rows = step
    case = make_case(heads, dim, block, rows, device=DEVICE, dtype=dtype, seed=dim)
    cache = random_cache(case, dtype=dtype)
    # As the model has it: queries are part of a wider row.
    query = draw(case.tokens, heads.query + 2 * heads.kv, dim, dtype=dtype)[:, : heads.query]
    found = gpu.paged_attention(query, cache, case.layout)
    assert error(found, attention(case, query, cache)) <= BOUNDS[dtype]
    assert not case.layout.paging.arrived.any(), "the next launch counts from zero"
    assert torch.equal(gpu.paged_attention(query, cache, case.layout), found), "merging depends on who arrives last"


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 50, 64, 300])
def test_attention_in_a_window_and_under_a_soft_cap(window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    """Windows shorter and longer than contexts, parts and tiles, on and beside the borders of blocks."""
    heads = Heads(6, 2)
    rows = [(399, 1), (63, 1), (7, 1), (0, 90), (250, 70), (64, 2)]
    case = make_case(heads, 32, 16, rows, device=DEVICE, dtype=dtype, segment=128)
    cache = random_cache(case, dtype=dtype)
    query = draw(case.tokens, heads.query, 32, dtype=dtype)
    found = gpu.paged_attention(query, cache, case.layout, window=window, softcap=softcap)
    assert error(found, attention(case, query, cache, window=window, softcap=softcap)) <= BOUNDS[dtype]


def test_attention_over_many_parts_and_padding() -> None:
    heads = Heads(8, 2)
    shape = LayoutShape(tokens=5, parts=16, tiles=0)
    case = make_case(heads, 64, 16, [(900, 1), (127, 1), (128, 1)], device=DEVICE, dtype=HALF, shape=shape, segment=128)
    assert (case.layout.parts[:, 0] >= 0).sum() == 8 + 1 + 2 + 2
    cache = random_cache(case, dtype=HALF)
    query = draw(5, heads.query, 64, dtype=HALF)
    found = gpu.paged_attention(query, cache, case.layout)
    assert error(found[:3], attention(case, query, cache)) <= BOUNDS[HALF]
    assert not found[3:].any(), "padding attends to nothing"


def test_attention_of_an_fp8_cache() -> None:
    heads = Heads(6, 2)
    case = make_case(heads, 64, 16, [(300, 1), (17, 1), (40, 50)], device=DEVICE, dtype=HALF)
    cache = random_cache(case, dtype=FP8)
    query = draw(case.tokens, heads.query, 64, dtype=HALF)
    assert error(gpu.paged_attention(query, cache, case.layout), attention(case, query, cache)) <= 2 * BOUNDS[HALF]


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
@pytest.mark.parametrize(
    ("heads", "dim", "block", "norms"), [(Heads(9, 3), 16, 16, False), (Heads(4, 1), 128, 32, True), (Heads(2, 2), 64, 64, True)]
)
def test_rope_store(heads: Heads, dim: int, block: int, norms: bool, dtype: torch.dtype) -> None:
    wide = BF16 if dtype == FP8 else dtype
    shape = LayoutShape(tokens=48, parts=200 + heads.spare_parts, tiles=9)
    case = make_case(heads, dim, block, [(0, 1), (77, 1), (130, 1), (11, 40)], device=DEVICE, dtype=wide, shape=shape)
    turning = heads.query + heads.kv
    qkv = draw(48, heads.query + 2 * heads.kv, dim, dtype=wide) * (300 if dtype == FP8 else 1)
    norm = draw(turning, dim, dtype=wide, seed=2) if norms else None
    angles = torch.rand(200, dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    before = torch.full((case.tables.size, block, 2 * heads.kv, dim), 3.0).to(dtype).to(DEVICE)
    cache, given = before.clone(), qkv.clone()
    table = gpu.rope_table(angles, wide).to(DEVICE)
    gpu.rope_store(qkv, cache, gpu.rope_rows(table, case.layout), case.layout, norm, 1e-5)
    expected = before.cpu().float().double().view(-1, 2 * heads.kv, dim)
    queries = []
    for token, (row, position) in enumerate(case.positions()):
        x = given[token].cpu().double()
        head = x[:turning]
        if norm is not None:
            head = head / (head.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.cpu().double()
        head = turned(head, angles[position])
        queries.append(head[: heads.query])
        kept = torch.cat((head[heads.query :], x[turning:]))
        expected[case.lines(row, position + 1)[-1]] = kept.clamp(-448, 448) if dtype == FP8 else kept
    found = cache.cpu().float().view(-1, 2 * heads.kv, dim)
    assert error(qkv[: case.tokens, : heads.query], torch.stack(queries)) <= BOUNDS[wide]
    assert error(found, expected) <= (0.04 if dtype == FP8 else BOUNDS[dtype])
    assert int((found == 3.0).all((1, 2)).sum()) == len(expected) - case.tokens, "padding and other rows' places stay"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (5, 576), (3, 4096), (2, 100)])
def test_add_rms_norm(rows: int, hidden: int, dtype: torch.dtype) -> None:
    residual, branch, weight = (
        draw(rows, hidden, dtype=dtype) * 9,
        draw(rows, hidden, dtype=dtype, seed=2),
        draw(hidden, dtype=dtype, seed=3),
    )
    total = residual + branch
    for added in (None, branch):
        expected = (residual if added is None else total).double()
        found = gpu.add_rms_norm(residual, added, weight, 1e-5)
        if added is not None:
            # The interpreter cuts bf16 off where a GPU rounds.
            same = torch.equal(residual, total) if GPU or dtype != BF16 else error(residual, total) <= BOUNDS[dtype]
            assert same, "the sum is rounded once, as the next stage sees it"
        expected = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        assert error(found, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("columns", [100, 1536])
def test_fp8_rows_are_those_of_the_definition(columns: int) -> None:
    residual, weight, both = (draw(*shape, dtype=torch.float16, seed=columns) for shape in ((5, columns), (columns,), (5, 2 * columns)))
    for found, plain in (
        (gpu.add_rms_norm_fp8(residual, None, weight, 1e-5), gpu.add_rms_norm(residual, None, weight, 1e-5)),
        (gpu.activate_fp8(both), gpu.activate(both)),
    ):
        expected = to_fp8(plain)
        torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
        # The interpreter loses the carry of what rounds up to a power of two.
        kept = torch.ones_like(plain, dtype=torch.bool) if GPU else expected.values.view(torch.uint8) % 8 != 0
        assert (found.values.float() != expected.values.float())[kept].float().mean() <= 0.002, "but for ties"
        assert error((found.values.float() * found.scales)[kept], plain[kept]) <= 0.04


#: The definitions of activations, in float64.
ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: 0.5 * x * (1 + (x / 2**0.5).erf()),
    "gelu_tanh": lambda x: 0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
    "relu2": lambda x: x.clamp_min(0) ** 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1536), (4, 33), (3, 1024)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activate(kind: Activation, rows: int, columns: int, dtype: torch.dtype) -> None:
    both = draw(rows, 2 * columns, dtype=dtype) * 4
    gate, up = both.double().chunk(2, -1)
    assert error(gpu.activate(both, kind), ACTIVATIONS[kind](gate) * up) <= BOUNDS[dtype]
    assert error(gpu.activate(both, kind, gated=False), ACTIVATIONS[kind](both.double())) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(biased: bool, dtype: torch.dtype) -> None:
    residual, branch = draw(5, 300, dtype=dtype) + 3, draw(5, 300, dtype=dtype, seed=1)
    weight, bias = draw(300, dtype=torch.float32, seed=2), draw(300, dtype=dtype, seed=3) if biased else None
    for added in (None, branch):
        total = residual.clone() if added is None else residual + added
        given = residual.clone()
        found = gpu.add_layer_norm(given, added, weight, bias, 1e-5)
        assert error(given, total) <= BOUNDS[dtype]
        exact = given.double()
        centred = exact - exact.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + (
            0 if bias is None else bias.double()
        )
        assert error(found, expected) <= BOUNDS[dtype]


def make_rings(words: int, sequences: int, taken: int = 0, step: int = 0) -> tuple[Rings, Submissions, Completions]:
    """Rings whose last submission had the number ``taken`` and was of ``step``."""
    device = CudaDevice(torch.device("cuda", 0)) if GPU else FakeDevice()
    rings = Rings.empty(device.pinned, DEVICE, words=words, sequences=sequences, depth=4)
    rings.taken.copy_(torch.tensor([taken, step]))
    rings.read.fill_(taken)
    return rings, Submissions(rings, device, Waiter()), Completions(rings, device)


def chosen(logits: torch.Tensor, params: list[SamplingParams], positions: list[int], shards: int = 1) -> list[int]:
    """Tokens through the kernels; ``positions`` are those that the tokens take. Rows sit in slots in falling order, and padding beside."""
    count = len(params)
    state = SlotState.empty(count, 1, DEVICE)
    state.seeds[:count] = torch.from_numpy(np.array([seed_keys(p.seed) for p in params], np.uint32).view(np.int32)).flip(0)
    state.temperatures[:count] = torch.tensor([p.temperature for p in params]).flip(0)
    state.tokens.fill_(-7)
    slots = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    asked = torch.tensor(positions, dtype=torch.int32, device=DEVICE) - 1
    width = -(-logits.shape[1] // shards)
    best = []
    for start in range(0, logits.shape[1], width):
        part = logits[:, start : start + width].contiguous()
        best.append(best_candidates(part, slots, asked, state, start))
    rings, _, completions = make_rings(8, count + 2, step=7)
    choose_tokens(best[0] if shards == 1 else torch.stack([merge_candidates(part) for part in best]), slots, asked, state, rings)
    assert asked.tolist() == positions
    assert not completions.of(6, count).ready() and not completions.of(3, count).ready()
    Waiter().until((completion := completions.of(7, count)).ready)
    tokens = completion.tokens.tolist()
    assert state.tokens.tolist() == [max(token, 0) for token in reversed(tokens)] + [-7]
    with_placeholders = torch.tensor([-1 if token % 2 == 0 else token for token in tokens], dtype=torch.int32, device=DEVICE)
    assert resolve_placeholders(with_placeholders, slots, state).tolist() == [max(token, 0) for token in tokens]
    assert with_placeholders.tolist() == [-1] * count
    return tokens


def test_submissions_are_taken_in_order() -> None:
    """Submissions of every size, more than the ring has entries, past the largest number; words that no update names stay."""
    draw, taken, room = np.random.default_rng(3), NUMBER_MASK - 4, 9000
    rings, submissions, _ = make_rings(8 + room, 1, taken)
    state = SlotState.empty(300, 9, DEVICE)
    memory, returned = (torch.full((room,), -5, dtype=torch.int32, device=DEVICE) for _ in range(2))
    expected, words = memory.cpu().numpy(), state.words.cpu().numpy()
    for step, (size, updates, returns) in enumerate(
        ((8, 3, 0), (0, 0, 0), (7001, 0, 0), (0, 1500, 5), (1, 1, 1), (0, 0, 70), (33, 999, 300))
    ):
        assert max(updates, returns) <= submissions.room(size)
        indices = draw.permutation(len(words)).astype(np.int32)[: updates + returns]
        values, given = (draw.integers(-(2**31), 2**31, count).astype(np.int32) for count in (updates, returns))
        inputs = submissions.open(size)
        inputs[:] = expected[:size] = draw.integers(-(2**31), 2**31, size)
        submissions.send(2**30 + step, size, SlotUpdates(indices[:updates], values, indices[updates:]))
        returned[:returns] = torch.from_numpy(given)
        take_submission(rings, memory, state, returned)
        words[indices] = np.concatenate((values, given))
        assert np.array_equal(memory.cpu().numpy(), expected) and np.array_equal(state.words.cpu().numpy(), words)
        assert rings.taken.tolist() == [(taken + 1 + step) & NUMBER_MASK, step] and rings.read.tolist() == rings.taken.tolist()[:1]


def test_padding_stays_where_it_is() -> None:
    slot, state = torch.zeros(1, dtype=torch.int32, device=DEVICE), SlotState.empty(1, 1, DEVICE)
    nowhere = slot - 1
    choose_tokens(best_candidates(torch.zeros(1, 8, device=DEVICE), slot, slot, state, 0), slot, nowhere, state, make_rings(8, 1)[0])
    assert nowhere.tolist() == [-1]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shards", [1, 3])
def test_chosen_tokens_are_those_of_the_definition(shards: int, dtype: torch.dtype) -> None:
    count, vocab = 24, 5000
    logits = draw(count, vocab, dtype=dtype) * 3
    params = [SamplingParams(temperature=(0.0, 1.0, 0.7, 30.0)[i % 4], seed=2**40 * i + 7) for i in range(count)]
    positions = [1 + 37 * i for i in range(count)]
    found = chosen(logits, params, positions, shards)
    for row, (token, p) in enumerate(zip(found, params, strict=True)):
        line = logits[row].float().cpu().numpy()
        if p.temperature == 0.0:
            assert token == choose(line, p, [], 0, positions[row])
            continue
        scores = line / np.float32(p.temperature) + gumbel(noise_bits(p.seed, positions[row], np.arange(vocab)))
        # Logarithms differ by an ulp between machines; a token may differ only where scores are nearly tied.
        assert scores[token] >= scores.max() - 1e-5


def test_ties_go_to_the_lowest_id_and_broken_rows_to_none() -> None:
    logits = torch.full((6, 4100), -1.0, device=DEVICE)
    logits[0, [4099, 2048, 77, 3000]] = 5.0
    logits[1, 4000] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 4098] = -7.0
    logits[5, 9] = torch.nan
    params = [SamplingParams(temperature=1.0 if row > 3 else 0.0) for row in range(6)]
    assert chosen(logits, params, [5] * 6) == [77, -1, -1, -1, 4098, -1]
    assert chosen(logits, params, [5] * 6, shards=2) == [77, -1, -1, -1, 4098, -1]


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_one_graph_serves_every_context() -> None:
    heads, rows = Heads(32, 8), 6
    shape = decode_shape(rows, heads)
    query = draw(rows, 32, 128, dtype=BF16)
    cases = [
        make_case(heads, 128, 16, [(n, 1) for n in starts], device=DEVICE, dtype=BF16, shape=shape, seed=9)
        for starts in ([5000, 1, 2, 3, 4, 5], [5000, 900, 10, 2000, 300, 4999], [5000, 5000, 5000])
    ]
    cache = random_cache(cases[1], dtype=BF16).nan_to_num(0.5)
    static = cases[0].layout
    gpu.paged_attention(query, cache, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.paged_attention(query, cache, static)
    for case in cases:
        tables = case.layout.paging.tables
        static.paging.tables[: len(tables)].copy_(tables)
        for mine, new in ((static.positions, case.layout.positions), (static.slots, case.layout.slots), (static.parts, case.layout.parts)):
            mine.copy_(new)
        graph.replay()
        assert error(out[: case.tokens], attention(case, query, cache)) <= BOUNDS[BF16]


def test_a_stage_computes_what_the_reference_kernels_do() -> None:
    model = uniform_decoder(
        architecture="qwen3", hidden_size=64, intermediate_size=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16, vocab_size=97,
        max_position=128, tied_embeddings=False, qk_norm="head", qkv_bias=True,
    )  # fmt: skip
    weights = random_weights(model)
    heads, tables = Heads(6, 2), np.arange(8, dtype=np.int32).reshape(2, 4)
    plain = make_stage(model, weights, positions=64)
    fast = make_stage(model, weights, positions=64, device=DEVICE, kernels=gpu)
    paging = Paging.over(torch.from_numpy(tables).to(DEVICE), heads)
    caches = [
        KvCache(model, plain.shard, blocks=8, block_size=16, dtype=torch.float32, device=d).layers for d in (torch.device("cpu"), DEVICE)
    ]
    for starts, lengths in (([0, 0], [20, 33]), ([20, 33], [1, 4]), ([21, 37], [1, 1])):
        begins, counts = np.array(starts, np.int32), np.array(lengths, np.int32)
        tokens = torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(starts[0]))
        shape = step_shape(counts, heads)
        packed = np.zeros(shape.size, np.int32)
        fill_layout(shape, packed, np.arange(2, dtype=np.int32), begins, counts, heads)
        layout = view_layout(shape, torch.from_numpy(packed).to(DEVICE), paging)
        with torch.inference_mode():
            expected = plain.logits(plain.forward(plain.embed(tokens), attention_layout(begins, counts, tables, 16), caches[0]))
            entering = fast.embed(tokens.to(DEVICE))
            found = fast.decode(entering.clone(), layout, caches[1]).float()
            assert torch.equal(found, fast.logits(fast.forward(entering, layout, caches[1])))
        assert error(found, expected) <= 1e-5
