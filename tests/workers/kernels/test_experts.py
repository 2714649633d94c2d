"""The experts of a mixture on a CPU, against their definition in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.support.expert_weights import KINDS, by_definition, choices, plain_experts, random_experts
from workers.kernels.experts import CpuExperts, choose
from workers.models.layers import in_fixed_tiles
from workers.protocol.specs import PLAIN, Quant, quant_of

#: Bounds of the relative error: integer weights are multiplied by inputs in bf16, and FP8 rounds the inputs of both products.
BOUNDS = {None: 1e-6, "int8": 1e-2, "int4": 1e-2, "fp8": 6e-2}
#: (experts, those of this rank).
RANKS = [(6, range(6)), (7, range(3, 5))]


@pytest.mark.parametrize("quant", [PLAIN, quant_of("int8"), quant_of("int4", 32), quant_of("fp8")], ids=lambda q: str(q.weights))
def test_a_token_gets_all_experts_that_it_chose(quant: Quant) -> None:
    for experts, held in RANKS:
        weights = random_experts(quant, len(held), 64, 32)
        module = CpuExperts(quant.weights, weights, torch.float32, activation="silu", first=held.start, tiled=lambda product: product)
        for kind in KINDS:
            for tokens in (1, 40):
                chosen = choices(kind, tokens, 2, experts, held)
                x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
                expected = by_definition(x, chosen, plain_experts(quant, weights), held.start)
                assert float((module(x, chosen) - expected).norm()) <= BOUNDS[quant.weights] * float(expected.norm()), (kind, tokens)


def test_other_tokens_of_a_step_do_not_change_one() -> None:
    weights = random_experts(PLAIN, 5, 64, 48)
    module = CpuExperts(None, weights, torch.float32, activation="silu", first=0, tiled=in_fixed_tiles)
    chosen = choices("spread", 50, 3, 5, range(5))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    together = module(x, chosen)
    for some in (slice(0, 1), slice(7, 8), slice(20, 41)):
        assert torch.equal(module(x[some], type(chosen)(chosen.experts[some], chosen.weights[some])), together[some])


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_softmax_may_come_before_or_after_the_choice(renormalise: bool) -> None:
    logits = torch.randn(30, 9, generator=torch.Generator().manual_seed(1)) * 5
    chosen = choose(logits, 3, renormalise=renormalise)
    top = logits.double().softmax(-1).topk(3)
    expected = top.values / top.values.sum(-1, keepdim=True) if renormalise else top.values
    assert torch.equal(chosen.experts, top.indices)
    torch.testing.assert_close(chosen.weights.double(), expected, rtol=1e-5, atol=1e-7)
