"""Products with weights in every format on a GPU at the 8B shape: microseconds, share of the limit, and with ``tune`` every tuning.

python -m bench.quant_gemm [products] [tune] [--output FILE]

Calls are replayed from one CUDA graph over rotating weights, larger than the cache. Results are first checked against the meaning of the
parts. ``tune`` tries tile sizes of the few-rows kernels; ``products`` shows at which row count torch's GEMMs overtake them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels import DEVICE, copies, limits, timed
from bench.report import record, say
from workers.kernels import linear, linear_gpu
from workers.kernels.linear_gpu import GemmTuning
from workers.layout.quant_parts import parts_of
from workers.models.layers import TORCH
from workers.protocol.specs import Quant, QuantName, quant_of

BF16 = torch.bfloat16
#: Outputs and inputs of the 8B shape's linear layers.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 64, 128, 256, 512, 2048)
QUANTS: dict[str, Quant] = {
    "bf16": Quant(),
    "int8": quant_of("int8"),
    "int4": quant_of("int4"),
    "int4 g128": quant_of("int4", 128),
    "fp8": quant_of("fp8"),
}
#: Layers with which each tuning is measured: few and many outputs, and a long sum.
TUNE_SHAPES = ("o", "gate-up", "down")
Call = Callable[[], object]


def random_parts(quant: Quant, outs: int, ins: int) -> dict[str, Tensor]:
    found = {}
    for part in parts_of(quant, "bf16"):
        shape, kind = part.shape(outs, ins), TORCH[part.format]
        if part.format in ("int8", "uint8"):
            found[part.suffix] = torch.randint(-127 if part.format == "int8" else 0, 127, shape, device=DEVICE).to(kind)
        elif part.format == "fp8":
            found[part.suffix] = torch.randn(shape, device=DEVICE).to(kind)
        else:
            found[part.suffix] = (torch.rand(shape, device=DEVICE) * 0.01 + 0.005).to(kind)
    return found


def check(quant: Quant, rows: int) -> float:
    """Relative error of one product against float64."""
    form = quant.weights
    parts, x = random_parts(quant, 4096, 4096), torch.randn(rows, 4096, device=DEVICE, dtype=BF16)
    found = linear_gpu.product(form, parts, None, BF16)(x)
    entering = linear.emulate_fp8(x.float()) if form == "fp8" else x
    expected = entering.double() @ (parts["weight"] if form is None else linear.dequantize(form, parts)).double().T
    return float((found.double() - expected).norm() / expected.norm())


def few(form: QuantName | None, parts: dict[str, Tensor], x: Tensor, tuning: GemmTuning | None) -> Callable[[], Tensor]:
    """The few-rows kernel alone, without the rounding of x."""
    weight = parts["weight"]
    if form == "int8":
        return partial(linear_gpu.int8_few, weight, parts["per_channel_scale"], None, x, tuning)
    values, scale = linear_gpu.to_fp8(x)
    return partial(linear_gpu.fp8_few, weight, parts["per_channel_scale"], None, values, scale, BF16, tuning)


def line(name: str, shape: str, rows: int, calls: list[Call], read: float, **more: Any) -> dict[str, Any]:
    """One measured line; a variant that the GPU refuses says so."""
    outs, ins = SHAPES[shape]
    found: dict[str, Any] = {"product": name, "shape": shape, "rows": rows, **more}
    try:
        seconds = timed(calls)
    except Exception as error:  # exceptions of the compiler: the question is only whether a variant runs
        torch.cuda.empty_cache()
        return {**found, "failed": f"{type(error).__name__}: {error}"[:160]}
    work = 2.0 * rows * outs * ins
    return {**found, "us": round(seconds * 1e6, 2), "tb_s": round(read / seconds / 1e12, 3), "tflop_s": round(work / seconds / 1e12, 1)}


def product_lines() -> Iterator[dict[str, Any]]:
    for name, quant in QUANTS.items():
        yield {"check": name, "errors": {rows: f"{check(quant, rows):.1e}" for rows in (1, 7, 64, 300)}}
    for (shape, (outs, ins)), rows in itertools.product(SHAPES.items(), ROWS):
        x = torch.randn(rows, ins, device=DEVICE, dtype=BF16)
        for name, quant in QUANTS.items():
            form = quant.weights
            sets = [random_parts(quant, outs, ins) for _ in range(copies(outs * ins))]
            read = float(sum(part.nbytes for part in sets[0].values()))
            made = [partial(linear_gpu.product(form, parts, None, BF16), x) for parts in sets]
            yield line(name, shape, rows, list(made), read)
            if form in linear_gpu.FEW and rows in (64, 128, 256, 512):
                yield line(f"{name}, few", shape, rows, [few(form, parts, x, None) for parts in sets], read)
        if rows > 16:
            yield from many_lines(shape, x, outs, ins)


def many_lines(shape: str, x: Tensor, outs: int, ins: int) -> Iterator[dict[str, Any]]:
    """torch's FP8 product alone, with exact and with fast sums."""
    parts = [random_parts(QUANTS["fp8"], outs, ins) for _ in range(copies(outs * ins))]
    values, scale = linear_gpu.to_fp8(x)
    for fast in (False, True):
        calls = [
            partial(
                torch._scaled_mm, values, p["weight"].t(), scale_a=scale, scale_b=p["per_channel_scale"][None, :], out_dtype=BF16,
                use_fast_accum=fast,
            )
            for p in parts
        ]  # fmt: skip
        yield line(f"fp8 torch, fast {fast}", shape, x.shape[0], list(calls), outs * ins)


def variants(rows: int) -> list[GemmTuning]:
    """Reasonable tunings for a tile of this many rows that fit a multiprocessor's shared memory."""
    if rows <= 16:
        tiles = itertools.product((16, 32, 64), (64, 128, 256, 512), (4, 8), (3, 5, 7))
    else:
        tiles = itertools.product((64, 128), (64, 128), (4, 8), (3, 4))
    held = [(GemmTuning(*tile), tile[0] * tile[1] * tile[3]) for tile in tiles]
    return [tuning for tuning, size in held if (16 << 10) <= size <= (190 << 10)]


def tuned_lines() -> Iterator[dict[str, Any]]:
    """Every reasonable tuning, by rows; compiled first, on all cores."""
    cases = [("int8", 1), ("int8", 64), ("int8", 256), ("fp8", 1)]
    jobs = [(name, shape, rows, tuning) for name, rows in cases for shape in ("o", "down") for tuning in variants(rows)]
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))
    for (name, rows), shape in itertools.product(cases, TUNE_SHAPES):
        quant, (outs, ins) = QUANTS[name], SHAPES[shape]
        form = quant.weights
        sets = [random_parts(quant, outs, ins) for _ in range(copies(outs * ins))]
        x = torch.randn(rows, ins, device=DEVICE, dtype=BF16)
        read = float(sum(part.nbytes for part in sets[0].values()))
        for tuning in variants(rows):
            yield line(name, shape, rows, [few(form, parts, x, tuning) for parts in sets], read, tuning=list(tuning))


def compile_one(name: str, shape: str, rows: int, tuning: GemmTuning) -> None:
    """Fill Triton's cache with one variant, in a process of its own."""
    ins = SHAPES[shape][1]
    x = torch.randn(rows, ins, device=DEVICE, dtype=BF16)
    line(name, shape, rows, [few(QUANTS[name].weights, random_parts(QUANTS[name], 256, ins), x, tuning)], 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=("products", "tune"), default=["products"])
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    copied, dense = limits()
    name = torch.cuda.get_device_name()
    say(f"{name}: copy {copied / 1e12:.2f} TB/s, bf16 product {dense / 1e12:.0f} TFLOP/s")
    makers = {"products": product_lines, "tune": tuned_lines}
    for found in itertools.chain.from_iterable(makers[part]() for part in args.parts):
        if "tb_s" in found:
            found["share"] = round(max(found["tb_s"] * 1e12 / copied, found["tflop_s"] * 1e12 / dense), 3)
        record(found | {"gpu": name}, args.output)


if __name__ == "__main__":
    main()
