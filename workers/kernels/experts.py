"""Products with the experts of a mixture, on a CPU; what they mean is what a GPU's are tested against.

Owns the form in which a CPU keeps experts. Every token gets all the experts that it chose: there is no capacity that could drop one. Must
never know of ranks or layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.kernels.linear import Parts, Product, product
from workers.kernels.reference import activate
from workers.protocol.specs import Activation, QuantName


class ExpertWeights(NamedTuple):
    """The weights of E experts: the parts of ``gate_up`` [E, 2 * columns, hidden], gate before up, and of ``down`` [E, hidden, columns]."""

    gate_up: Parts
    down: Parts


class Chosen(NamedTuple):
    """What a router chose for T tokens: ``experts`` [T, k] int64, all different in a row, and ``weights`` [T, k] fp32."""

    experts: Tensor
    weights: Tensor


class Experts(Protocol):
    """Experts ``first``, ``first`` + 1, ... of a mixture, filled and ready."""

    def __call__(self, x: Tensor, chosen: Chosen) -> Tensor:
        """[T, hidden]: the weighted sum of what these experts give for the rows of ``x`` [T, hidden] that chose them; zeros for others."""


class MakeExperts(Protocol):
    """Makes the experts of filled ``weights``, which the caller drops afterwards. ``form``: of the weights, None = plain; ``dtype``: the
    one that is computed in; ``tiled``: brings a product into the form in which its bits depend on its own row alone, or leaves it."""

    def __call__(
        self,
        form: QuantName | None,
        weights: ExpertWeights,
        dtype: torch.dtype,
        *,
        activation: Activation,
        first: int,
        tiled: Callable[[Product], Product],
    ) -> Experts: ...


def choose(logits: Tensor, count: int, *, renormalise: bool) -> Chosen:
    """The ``count`` experts with the largest ``logits`` [T, experts] fp32, and their weights: the softmax over all experts, or with
    ``renormalise`` over the chosen ones."""
    top = logits.topk(count, dim=-1)
    if renormalise:
        return Chosen(top.indices, top.values.softmax(-1))
    return Chosen(top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).exp())


class CpuExperts:
    """Two products for each expert, of which only those with tokens are computed."""

    def __init__(
        self,
        form: QuantName | None,
        weights: ExpertWeights,
        dtype: torch.dtype,
        *,
        activation: Activation,
        first: int,
        tiled: Callable[[Product], Product],
    ) -> None:
        self._activation, self._first = activation, first
        count = len(weights.down["weight"])
        self._products = [
            tuple(tiled(product(form, {name: part[index] for name, part in parts.items()}, None, dtype)) for parts in weights)
            for index in range(count)
        ]

    def __call__(self, x: Tensor, chosen: Chosen) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32)
        flat = chosen.experts.reshape(-1)
        # Tokens of one expert after another. A token's experts are added in the order of their numbers, whatever else is in the step.
        order = flat.argsort(stable=True)
        tokens, weights = order // chosen.experts.shape[1], chosen.weights.reshape(-1)[order].unsqueeze(1)
        ends = torch.bincount(flat, minlength=self._first + len(self._products)).cumsum(0).tolist()
        for index, (gate_up, down) in enumerate(self._products):
            number = self._first + index
            start, stop = ends[number - 1] if number else 0, ends[number]
            if start == stop:
                continue
            rows = tokens[start:stop]
            given = down(activate(gate_up(x.index_select(0, rows)), self._activation))
            out.index_add_(0, rows, given.float().mul_(weights[start:stop]))
        return out.to(x.dtype)
