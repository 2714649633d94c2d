"""The shared state of all layers in one forward pass, and the parts from which blocks are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.distributed.group import FusedAllReduceNorm, Group
from workers.kernels import Kernels, experts_for
from workers.kernels.experts import Experts, ExpertWeights
from workers.kernels.reference import AttentionLayout
from workers.kernels.step_layout import DeviceLayout
from workers.layout.quant_parts import parts_of
from workers.models.layers import DTYPES, TORCH, Linear
from workers.protocol.specs import Quant


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The shared state of all layers in one forward pass. ``ropes``: the entries of the model's rotary tables for this step, one a
    table."""

    kernels: Kernels[Any]
    layout: AttentionLayout | DeviceLayout
    ropes: tuple[Tensor, ...]
    group: Group
    allreduce_norm: FusedAllReduceNorm | None


class BlockParts:
    """Makes the parameters of one layer's blocks in the shapes that this rank stores (:mod:`workers.layout.declaration`).

    ``shapes``: of the layer's tensors on this rank, by their checkpoint names within the layer.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, quant: Quant) -> None:
        self._shapes, self._dtype, self._device, self._quant = shapes, dtype, device, quant

    def linear(self, *names: str) -> Linear:
        """A linear layer that computes the products of the tensors ``names`` at once: their rows one after another."""
        rows = sum(self._shapes[f"{name}.weight"][0] for name in names)
        bias = f"{names[0]}.bias" in self._shapes
        columns = self._shapes[f"{names[0]}.weight"][1]
        return Linear(rows, columns, bias=bias, dtype=self._dtype, device=self._device, quant=self._quant)

    def exact_linear(self, name: str) -> Linear:
        """A linear layer of the tensor ``name`` that computes in fp32, whatever the others do."""
        return Linear(*self._shapes[f"{name}.weight"], bias=False, dtype=torch.float32, device=self._device)

    def experts(self, names: list[str]) -> tuple[ExpertWeights, Callable[..., Experts]]:
        """The uninitialized weights of the experts ``names``, which have one shape; and what makes the experts of them when they are
        filled (:class:`workers.kernels.experts.MakeExperts`, without the format)."""
        columns, hidden = self._shapes[f"{names[0]}.fc.weight"]
        gate_up, down = (self._stacked(len(names), *shape) for shape in ((2 * columns, hidden), (hidden, columns)))

        def make(weights: ExpertWeights, **facts: Any) -> Experts:
            return experts_for(self._device)(self._quant.weights, weights, self._dtype, **facts)

        return ExpertWeights(gate_up, down), make

    def _stacked(self, count: int, out_features: int, in_features: int) -> dict[str, Tensor]:
        """The parts of ``count`` weights [out_features, in_features], stacked."""
        return {
            part.suffix: torch.empty(count, *part.shape(out_features, in_features), dtype=TORCH[part.format], device=self._device)
            for part in parts_of(self._quant, DTYPES[self._dtype])
        }

    def vector(self, name: str, *, exact: bool = False) -> Tensor:
        """The tensor ``name``, in the dtype that is computed in; ``exact``: in fp32."""
        return torch.empty(self._shapes[name], dtype=torch.float32 if exact else self._dtype, device=self._device)

    def empty(self, *shape: int, exact: bool = False) -> Tensor:
        """An uninitialized tensor that no file holds; ``exact``: in fp32."""
        return torch.empty(shape, dtype=torch.float32 if exact else self._dtype, device=self._device)

    def ones(self, *shape: int) -> Tensor:
        """Ones, which no file holds."""
        return torch.ones(shape, dtype=self._dtype, device=self._device)
