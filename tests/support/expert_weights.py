"""Random experts in each number format, and choices of experts of every kind that a router may make."""

from __future__ import annotations

import torch

from tests.support.packed_weights import random_parts
from workers.kernels.experts import Chosen, ExpertWeights
from workers.kernels.linear import dequantize
from workers.protocol.specs import PLAIN, Quant

#: What the tokens of a step choose.
KINDS = ("spread", "all the same", "half of the experts", "other ranks'")


def random_experts(quant: Quant, count: int, hidden: int, columns: int) -> ExpertWeights:
    """``count`` experts, each of which has other weights."""
    stacks = []
    for outs, ins in ((2 * columns, hidden), (hidden, columns)):
        if quant == PLAIN:
            stacks.append({"weight": torch.randn(count, outs, ins, generator=torch.Generator().manual_seed(outs)) / ins**0.5})
            continue
        each = [random_parts(quant, outs, ins, seed) for seed in range(count)]
        stacks.append({name: torch.stack([parts[name] for parts in each]) for name in each[0]})
    return ExpertWeights(*stacks)


def plain_experts(quant: Quant, weights: ExpertWeights) -> ExpertWeights:
    """The same experts in fp32."""
    form = quant.weights
    if form is None:
        return weights
    count = len(weights.down["weight"])
    return ExpertWeights(
        *(
            {"weight": torch.stack([dequantize(form, {name: part[index] for name, part in parts.items()}) for index in range(count)])}
            for parts in weights
        )
    )


def choices(kind: str, tokens: int, each: int, experts: int, held: range) -> Chosen:
    """``each`` different experts for each of ``tokens``; ``held``: those of this rank."""
    generator = torch.Generator().manual_seed(tokens)
    allowed = torch.arange(experts)
    if kind == "half of the experts":
        allowed = allowed[: max(each, experts // 2)]
    elif kind == "other ranks'":
        allowed = torch.tensor([number for number in range(experts) if number not in held][:each] or list(range(each)))
    elif kind == "all the same":
        allowed = torch.arange(held.start, held.start + each)
    chosen = torch.stack([allowed[torch.randperm(len(allowed), generator=generator)[:each]] for _ in range(tokens)])
    return Chosen(chosen, torch.rand(tokens, each, generator=generator))


def by_definition(x: torch.Tensor, chosen: Chosen, weights: ExpertWeights, first: int) -> torch.Tensor:
    """[T, hidden] fp64: the sum that plain ``weights`` stand for, a token and an expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    gate_up, down = weights.gate_up["weight"].double(), weights.down["weight"].double()
    for token, (experts, gains) in enumerate(zip(chosen.experts.tolist(), chosen.weights.double(), strict=True)):
        for number, gain in zip(experts, gains, strict=True):
            if first <= number < first + len(down):
                gate, up = (gate_up[number - first] @ x[token].double()).chunk(2)
                out[token] += gain * (down[number - first] @ (torch.nn.functional.silu(gate) * up))
    return out
