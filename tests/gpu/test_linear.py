"""The GPU's products with quantized weights against float64, on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import itertools
import os

import pytest
import torch

from tests.support.packed_weights import random_parts
from workers.kernels.linear import Fp8Rows, dequantize
from workers.kernels.linear import to_fp8 as rounded
from workers.protocol.errors import ConfigError
from workers.protocol.specs import Quant, quant_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: triton is not installed (it comes with torch for CUDA)", allow_module_level=True)
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from workers.kernels import gemv, linear_gpu  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
#: (rows, outputs, inputs, bias): one row, several row tiles, widths that no tile divides.
CASES = [(1, 48, 128, True), (5, 33, 192, False), (17, 70, 320, True), (80, 96, 448, False)]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; NaN when anything is NaN."""
    return float((out.double().cpu() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given to write is full of NaN."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        made = plain(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() and made.element_size() > 1 else made

    monkeypatch.setattr(linear_gpu.torch, "empty", empty)


INTEGERS = [quant_of("int8"), quant_of("int4", 32), quant_of("int4", 64)]
#: The interpreter has no products of bf16.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]


@pytest.mark.parametrize(
    ("quant", "dtype"), [*itertools.product(INTEGERS, DTYPES), (quant_of("fp8"), torch.bfloat16)], ids=lambda v: getattr(v, "weights", None)
)
def test_products(quant: Quant, dtype: torch.dtype) -> None:
    form = quant.weights
    assert form is not None
    for seed, (rows, outs, ins, biased) in enumerate(CASES):
        if form == "fp8":
            outs = -(-outs // 16) * 16
        parts = random_parts(quant, outs, ins, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, ins, generator=generator).to(dtype)
        bias = torch.randn(outs, generator=generator).to(dtype) if biased else None
        fp8_rows = rounded(x)
        entering = fp8_rows.values.double() * fp8_rows.scales.double() if form == "fp8" else x.double()
        expected = entering @ dequantize(form, parts).double().T
        expected = expected if bias is None else expected + bias.double()
        run = linear_gpu.product(form, {n: p.to(DEVICE) for n, p in parts.items()}, bias if bias is None else bias.to(DEVICE), dtype)
        if form == "fp8" and rows > linear_gpu.FEW["fp8"] and not GPU:
            continue  # torch's own product, which no CPU has
        found = run(Fp8Rows(*(t.to(DEVICE) for t in fp8_rows)) if form == "fp8" else x.to(DEVICE))
        assert found.dtype == dtype and found.shape == expected.shape
        assert error(found, expected) < BOUNDS[dtype], (rows, outs, ins)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize(("outs", "ins", "biased"), [(48, 128, False), (33, 193, True), (7, 2048, False), (130, 5000, True)])
def test_gemv(outs: int, ins: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of less than a tile, of one, and of what no tile divides."""
    generator = torch.Generator().manual_seed(outs)
    weight, x = torch.randn(outs, ins, generator=generator).to(dtype), torch.randn(1, ins, generator=generator).to(dtype)
    bias = torch.randn(outs, generator=generator).to(dtype) if biased else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    product = linear_gpu.product(None, {"weight": weight.to(DEVICE)}, bias if bias is None else bias.to(DEVICE), dtype)
    found = product(x.to(DEVICE))
    assert found.dtype == dtype and found.shape == expected.shape
    assert error(found, expected) < BOUNDS[dtype]
    if GPU:
        return
    # Every sum is whole whatever the tile: small integers make sums exact.
    weight, x = (torch.randint(-3, 4, t.shape, generator=generator).to(dtype) for t in (weight, x))
    monkeypatch.setattr(gemv, "tile_for", lambda weight: gemv.GemvTile(4, 64, 4))
    assert torch.equal(gemv.gemv(weight, None, x), (x.double() @ weight.double().T).to(dtype))


def test_rows_are_rounded_to_fp8_as_on_a_cpu() -> None:
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[3] = 0
    values, scale = linear_gpu.to_fp8(x.to(DEVICE))
    expected, expected_scale = rounded(x)
    assert torch.allclose(scale.cpu(), expected_scale, rtol=1e-6)
    steps = values.cpu().view(torch.uint8).int() - expected.view(torch.uint8).int()
    # A last bit of the scale moves what lies at a tie; the interpreter also loses carries into the exponent.
    assert (steps != 0).float().mean() < (0.01 if GPU else 0.05)
    assert steps.abs().max() <= (1 if GPU else 8)


def test_fp8_shapes_that_the_instructions_do_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        linear_gpu.product("fp8", random_parts(quant_of("fp8"), 24, 64), None, torch.bfloat16)
    with pytest.raises(ConfigError, match="computes in float16"):
        linear_gpu.product("fp8", random_parts(quant_of("fp8"), 32, 64), None, torch.float16)
