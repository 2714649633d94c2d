"""Measures each GPU kernel alone at serving shapes: its rate, its share of this GPU's measured limit, and FA3's figure for the same shape.

python -m bench.kernels [attention] [fused] [choose] [product] [layer] [tune] [--output FILE]

Calls are replayed from one CUDA graph over rotating inputs, larger than the cache. ``tune`` tries every sensible tuning of the attention
kernels. Limits are measured first: an elementwise kernel (read and written bytes) and an 8192-cubed bf16 product.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.report import commit, facts, record, say
from workers.distributed.group import Solo
from workers.kernels import gpu, step_layout
from workers.kernels.attention import AttentionTuning
from workers.kernels.step_ends import best_candidates, choose_tokens
from workers.kernels.step_layout import DeviceLayout, Heads, Paging, Rings, SlotState, fill_layout, step_shape, view_layout
from workers.layout.sharding import shard_of
from workers.models.decoder import DecoderStage
from workers.protocol.specs import Parallel, uniform_decoder
from workers.runner.device import CudaDevice

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 16
#: (query heads, key/value heads, rows, context, FA3's TB/s on an H100 or None).
DECODES = (
    (32, 8, 512, 400, 2.32),
    (32, 8, 256, 640, 2.56),
    (32, 8, 64, 4096, 2.84),
    (32, 8, 8, 4096, 1.11),
    (32, 8, 1, 384, None),
    (32, 8, 1, 32768, None),
    (32, 4, 256, 640, None),
    (16, 4, 256, 640, None),
)
#: (rows, tokens a row, FA3's TFLOP/s on an H100 or None), 32 query and 8 key/value heads of 128.
TILES = ((4, 2048, 485.0), (16, 512, 252.0), (1, 8192, 567.0))
DIM = 128
#: Bytes of inputs that rotating calls go through, several times the largest cache.
ROTATED = 400e6

Call = Callable[[], object]
Line = dict[str, Any]


class Case(NamedTuple):
    """``calls`` rotate over inputs; one does ``amount`` bytes or operations of ``unit``; ``anchor``: FA3's rate."""

    name: str
    calls: Sequence[Call]
    unit: str
    amount: float
    anchor: float | None = None
    tuning: AttentionTuning | None = None


def timed(calls: Sequence[Call], repeats: int = 12) -> float:
    """Median seconds of one of ``calls``, replayed from a graph that holds them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 24 // len(calls))
    with torch.cuda.graph(graph):
        for call in itertools.chain.from_iterable([calls] * rounds):
            call()
    graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found) / (rounds * len(calls))


def copies(each: float) -> int:
    """How many sets of ``each`` bytes of inputs to rotate."""
    return max(1, min(16, round(ROTATED / each)))


def make_layout(heads: Heads, starts: list[int], lengths: list[int]) -> DeviceLayout:
    """Rows over shuffled blocks: 0 .. rows * width."""
    rows, width = len(starts), -(-(max(starts) + max(lengths)) // BLOCK)
    shape = step_shape(np.array(lengths, np.int32), heads)
    packed = np.zeros(shape.size, np.int32)
    fill_layout(shape, packed, np.arange(rows, dtype=np.int32), np.array(starts, np.int32), np.array(lengths, np.int32), heads)
    paging = Paging.over(torch.randperm(rows * width, device=DEVICE).view(rows, width).int(), heads)
    return view_layout(shape, torch.from_numpy(packed).to(DEVICE), paging)


def make_cache(heads: Heads, rows: int, context: int, dtype: torch.dtype) -> Tensor:
    blocks = rows * -(-context // BLOCK)
    return torch.randn(blocks, BLOCK, 2 * heads.kv, DIM, device=DEVICE, dtype=BF16).to(dtype)


def make_qkv(heads: Heads, tokens: int) -> Tensor:
    return torch.randn(tokens, heads.query + 2 * heads.kv, DIM, device=DEVICE, dtype=BF16)


def decode_calls(heads: Heads, rows: int, context: int, dtype: torch.dtype) -> tuple[Callable[[AttentionTuning | None], list[Call]], float]:
    """(calls over rotating caches for a tuning, bytes of keys and values that one call reads)."""
    read = rows * context * 2 * heads.kv * DIM * dtype.itemsize
    query, plan = make_qkv(heads, rows)[:, : heads.query], make_layout(heads, [context - 1] * rows, [1] * rows)
    caches = [make_cache(heads, rows, context, dtype) for _ in range(copies(read))]
    return lambda tuning: [lambda c=cache: gpu.paged_attention(query, c, plan, decode=tuning) for cache in caches], read  # type: ignore[misc]


def tile_calls(rows: int, length: int) -> tuple[Callable[[AttentionTuning | None], list[Call]], float]:
    """(calls for a tuning, floating-point operations of one): causal attention of whole prompts."""
    heads = Heads(32, 8)
    query, plan = make_qkv(heads, rows * length)[:, : heads.query], make_layout(heads, [0] * rows, [length] * rows)
    cache = make_cache(heads, rows, length, BF16)
    work = rows * 4 * DIM * heads.query * length * (length + 1) / 2
    return lambda tuning: [lambda: gpu.paged_attention(query, cache, plan, tile=tuning)], work


def limits() -> tuple[float, float]:
    """(bytes/s read and written by one elementwise kernel, FLOP/s of a large bf16 product)."""
    source = torch.randn(2**29, device=DEVICE, dtype=BF16)
    target = torch.empty_like(source)
    # A kernel, not a memcpy: replayed from a graph, the driver's own copy was a fifth slower than what kernels reach.
    copied = 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    return copied, 2 * 8192**3 / timed([lambda: a @ b])


def attention_cases(
    decodes: Sequence[AttentionTuning | None], tiles: Sequence[AttentionTuning | None], dtypes: Sequence[torch.dtype]
) -> Iterator[Case]:
    for (queries, kv, rows, context, anchor), dtype in itertools.product(DECODES, dtypes):
        calls, read = decode_calls(Heads(queries, kv), rows, context, dtype)
        name = f"decode {rows} x {context}, {queries}/{kv}{' fp8' if dtype == FP8 else ''}"
        for tuning in decodes:
            yield Case(name, calls(tuning), "TB/s", read, anchor if dtype == BF16 else None, tuning)
    for rows, length, anchor in TILES:
        calls, work = tile_calls(rows, length)
        for tuning in tiles:
            yield Case(f"prefill {rows} x {length}, 32/8", calls(tuning), "TFLOP/s", work, anchor, tuning)


def tuned_cases() -> Iterator[Case]:
    """Every reasonable tuning; compiled first, on all cores."""
    decodes = [AttentionTuning(k, w, s) for k, w in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8)) for s in (3, 5, 7)]
    decodes += [AttentionTuning(128, w, s) for w in (4, 8) for s in (3, 5)]
    tiles = (
        [AttentionTuning(64, 8, s) for s in (2, 3, 5, 7)]
        + [AttentionTuning(128, 8, s) for s in (2, 3, 5)]
        + [AttentionTuning(64, 4, 3), AttentionTuning(32, 8, 5)]
    )
    variants = [("decode", t) for t in decodes] + [("tile", t) for t in tiles]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*variants, strict=True)))
    yield from attention_cases(decodes, tiles, (BF16,))


def compile_one(kind: str, tuning: AttentionTuning) -> None:
    """Fill Triton's cache with one variant, in a process of its own."""
    calls, _ = decode_calls(Heads(32, 8), 1, 256, BF16) if kind == "decode" else tile_calls(1, 256)
    measure(Case(kind, calls(tuning)[:1], "", 0.0))


def measure(case: Case) -> Line:
    """One line; a variant that the GPU refuses (too much shared memory) says so."""
    line: Line = {"kernel": case.name, "unit": case.unit, "anchor": case.anchor, "tuning": case.tuning}
    try:
        seconds = timed(case.calls)
    except Exception as error:  # exceptions of the compiler: the question is only whether a variant runs
        torch.cuda.empty_cache()
        return {**line, "failed": f"{type(error).__name__}: {error}"[:160]}
    return {**line, "us": round(seconds * 1e6, 2), "rate": round(case.amount / seconds / 1e12, 3)}


def fused_cases() -> Iterator[Case]:
    heads, hidden, columns = Heads(32, 8), 4096, 14336
    weight = torch.randn(hidden, device=DEVICE, dtype=BF16)
    table = gpu.rope_table(torch.rand(8192, DIM // 2) * 6, BF16).to(DEVICE)
    for tokens in (1, 16, 256, 8192):
        sets = copies(tokens * hidden * 6)
        pairs = [[torch.randn(tokens, hidden, device=DEVICE, dtype=BF16) for _ in range(2)] for _ in range(sets)]
        norms: list[Call] = [lambda p=p: gpu.add_rms_norm(p[0], p[1], weight, 1e-5) for p in pairs]  # type: ignore[misc]
        yield Case(f"add + norm, {tokens} x {hidden}", norms, "TB/s", tokens * hidden * 8)
        wide = [torch.randn(tokens, 2 * columns, device=DEVICE, dtype=BF16) for _ in range(copies(tokens * columns * 4))]
        mixed: list[Call] = [lambda w=w: gpu.activate(w) for w in wide]  # type: ignore[misc]
        yield Case(f"SiLU * mul, {tokens} x {columns}", mixed, "TB/s", tokens * columns * 6)
        rows = [1] * tokens if tokens <= 256 else [2048] * 4
        plan = make_layout(heads, [0 if n > 1 else 500 for n in rows], rows)
        cache = make_cache(heads, len(rows), 2048, BF16)
        qkvs = [make_qkv(heads, tokens) for _ in range(copies(tokens * 48 * DIM * 2))]
        turns: list[Call] = [lambda q=q, c=cache, p=plan: gpu.rope_store(q, c, table, p, None, 1e-5) for q in qkvs]  # type: ignore[misc]
        yield Case(f"rope + store, {tokens}", turns, "TB/s", tokens * DIM * 2 * 2 * 48)


def choose_cases() -> Iterator[Case]:
    for rows in (1, 64, 512):
        logits = [torch.randn(rows, 128256, device=DEVICE, dtype=BF16) for _ in range(copies(rows * 128256 * 2))]
        slots, positions = (torch.arange(rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
        rings = Rings.empty(CudaDevice(DEVICE).pinned, DEVICE, words=8, sequences=rows, depth=4)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            state = SlotState.empty(rows, 1, DEVICE)
            state.temperatures.fill_(temperature)

            def choose(x: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, state: SlotState, rings: Rings) -> None:
                choose_tokens(best_candidates(x, slots, positions, state, 0), slots, positions, state, rings)

            calls: list[Call] = [partial(choose, x, slots, positions, state, rings) for x in logits]
            yield Case(f"choose, {rows} x 128256, {name}", calls, "TB/s", rows * 128256 * 2)


def product_cases() -> Iterator[Case]:
    """torch's own products with the 8B shape's weights: they bound a decode step."""
    for name, outputs, inputs in (
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate-up", 28672, 4096),
        ("down", 4096, 14336),
        ("head", 128256, 4096),
    ):
        weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) for _ in range(copies(outputs * inputs * 2))]
        for rows in (1, 16, 64, 256):
            x = torch.randn(rows, inputs, device=DEVICE, dtype=BF16)
            calls: list[Call] = [lambda x=x, w=w: functional.linear(x, w) for w in weights]  # type: ignore[misc]
            yield Case(f"product {name}, {rows} rows", calls, "TB/s", outputs * inputs * 2)


def layer_cases() -> Iterator[Case]:
    """Whole decoder layers of the 8B shape, as a decode step runs them: this shows the gaps between the kernels."""
    count = 4
    model = uniform_decoder(
        architecture="llama", hidden_size=4096, intermediate_size=14336, num_layers=count, num_heads=32, num_kv_heads=8, head_dim=DIM,
        vocab_size=256, max_position=4096, tied_embeddings=True,
    )  # fmt: skip
    heads, shard = Heads(32, 8), shard_of(model, Parallel(), 0)
    stage = DecoderStage(model, Parallel(), shard, Solo(), dtype=BF16, device=DEVICE, positions=4096)
    for weight in stage.parameters().values():
        weight.normal_(std=0.02)
    stage.freeze()
    weights = 2 * (4096 * 4096 * 2 + 4096 * 2048 + 3 * 4096 * 14336)
    for rows, context in ((1, 384), (64, 640), (256, 640)):
        plan = make_layout(heads, [context - 1] * rows, [1] * rows)
        caches = [make_cache(heads, rows, context, BF16) for _ in range(count)]
        hidden = torch.randn(rows, 4096, device=DEVICE, dtype=BF16)
        read = weights + rows * context * 2 * heads.kv * DIM * 2
        calls: list[Call] = [lambda h=hidden, p=plan, c=caches: stage.forward(h, p, c)]  # type: ignore[misc]
        yield Case(f"{count} decode layers, {rows} x {context}", calls, "TB/s", count * read)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": lambda: attention_cases([None], [None], (BF16, FP8)),
    "fused": fused_cases,
    "choose": choose_cases,
    "product": product_cases,
    "layer": layer_cases,
    "tune": tuned_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all except the last if none is named")
    parser.add_argument("--splits", type=int, default=step_layout.SPLIT_PROGRAMS, help="programs over which decodes are spread")
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--commit", default=commit())
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    step_layout.SPLIT_PROGRAMS = args.splits
    copied, product = limits()
    name = torch.cuda.get_device_name()
    say(f"{name}: copy {copied / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    for case in itertools.chain.from_iterable(PARTS[part]() for part in args.parts or list(PARTS)[:-1]):
        if args.match not in case.name:
            continue
        line = measure(case)
        if "rate" in line:
            limit = copied if line["unit"] == "TB/s" else product
            line |= {"limit": round(limit / 1e12, 3), "share": round(line["rate"] * 1e12 / limit, 3)}
        record(facts(args.commit) | {"gpu": name, "splits": args.splits} | line, args.output)


if __name__ == "__main__":
    main()
