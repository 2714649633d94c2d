"""The GPU's products with experts against their definition in fp64, on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.support.expert_weights import KINDS, by_definition, choices, plain_experts, random_experts
from workers.kernels.experts import Chosen, ExpertWeights
from workers.kernels.linear import emulate_fp8
from workers.protocol.errors import ConfigError
from workers.protocol.specs import PLAIN, Quant, quant_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: triton is not installed (it comes with torch for CUDA)", allow_module_level=True)
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from workers.kernels import experts_gpu  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
#: (experts, those of this rank, hidden, columns): more experts than choices, uneven ranks, widths that no tile divides.
SHAPES = [(6, range(6), 64, 48), (9, range(3, 5), 192, 80)] if GPU else [(5, range(2, 5), 48, 40)]
TOKENS = [1, 2, 37, 400] if GPU else [1, 20]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given to write is full of NaN."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        made = plain(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() and made.element_size() > 1 else made

    monkeypatch.setattr(experts_gpu.torch, "empty", empty)


def on_device(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    def moved(part: torch.Tensor, name: str) -> torch.Tensor:
        plain = name == "weight" and part.dtype == torch.float32
        return part.to(DEVICE, dtype if plain else part.dtype)

    return ExpertWeights(*({name: moved(part, name) for name, part in parts.items()} for parts in weights))


#: The interpreter has no products of bf16.
CASES = [(PLAIN, torch.float32), (PLAIN, torch.float16), (quant_of("int8"), torch.float16)]
CASES += [(PLAIN, torch.bfloat16), (quant_of("fp8"), torch.bfloat16)] if GPU else []
BOUNDS = {torch.float32: 2e-3 if GPU else 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("quant", "dtype"), CASES, ids=str)
def test_a_token_gets_all_experts_that_it_chose(quant: Quant, dtype: torch.dtype) -> None:
    for experts, held, hidden, columns in SHAPES:
        weights = random_experts(quant, len(held), hidden, columns)
        module = experts_gpu.GpuExperts(
            quant.weights, on_device(weights, dtype), dtype, activation="silu", first=held.start, tiled=lambda product: product
        )
        for kind in KINDS:
            for tokens in TOKENS:
                chosen = choices(kind, tokens, 2, experts, held)
                x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                wide = emulate_fp8(x) if quant.weights == "fp8" else x
                expected = by_definition(wide.float(), chosen, plain_experts(quant, weights), held.start)
                bound = 6e-2 if quant.weights == "fp8" else BOUNDS[dtype]
                found = module(x.to(DEVICE), Chosen(*(each.to(DEVICE) for each in chosen))).double().cpu()
                assert float((found - expected).norm()) <= bound * float(expected.norm()), (kind, tokens)


def test_the_sort_keeps_the_order_of_each_experts_choices() -> None:
    chosen = torch.randint(0, 8, (1500, 2), generator=torch.Generator().manual_seed(0))
    found = experts_gpu.sort_choices(chosen.to(DEVICE), 2, 4)
    counts, starts = found.counts.cpu().tolist(), found.starts.cpu().tolist()
    for index in range(4):
        expected = (chosen.view(-1) == index + 2).nonzero().view(-1)
        assert found.order.cpu()[starts[index] : starts[index] + counts[index]].tolist() == expected.tolist()


def test_a_tile_for_every_row_and_no_more_than_the_grid_has() -> None:
    for choices_, experts in ((1, 128), (8, 128), (64, 8), (4096, 128), (65536, 128), (7, 3)):
        rows = experts_gpu.row_tile(choices_, experts)
        worst = [1] * (min(experts, choices_) - 1)
        worst.append(choices_ - len(worst))
        assert sum(-(-count // rows) for count in worst) <= experts_gpu.most_tiles(choices_, experts, rows)
        assert 16 <= rows <= 128 and rows & (rows - 1) == 0


def test_four_bit_experts_are_refused_by_name() -> None:
    weights = random_experts(quant_of("int4", 32), 2, 64, 32)
    with pytest.raises(ConfigError, match="experts are not multiplied in int4 on a GPU"):
        experts_gpu.GpuExperts("int4", weights, torch.float16, activation="silu", first=0, tiled=lambda product: product)


@pytest.mark.skipif(not GPU, reason="graphs are captured on a GPU only")
def test_a_captured_step_serves_any_choice() -> None:
    weights = random_experts(PLAIN, 6, 64, 48)
    module = experts_gpu.GpuExperts(
        None, on_device(weights, torch.bfloat16), torch.bfloat16, activation="silu", first=0, tiled=lambda product: product
    )
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    held = Chosen(*(each.to(DEVICE) for each in choices("spread", 37, 2, 6, range(6))))
    given = x.to(DEVICE)
    module(given, held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(given, held)
    for kind in KINDS:
        chosen = choices(kind, 37, 2, 6, range(6))
        held.experts.copy_(chosen.experts)
        held.weights.copy_(chosen.weights)
        graph.replay()
        expected = by_definition(x.float(), chosen, weights, 0)
        assert float((out.double().cpu() - expected).norm()) <= 2e-2 * float(expected.norm()), kind
