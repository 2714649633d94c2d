"""What all layers share in one forward pass, and the parts from which blocks are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.distributed.group import FusedAllReduceNorm, Group
from workers.kernels import Kernels
from workers.kernels.linear import Fp8Rows
from workers.kernels.reference import AttentionLayout
from workers.kernels.step_layout import DeviceLayout
from workers.models.layers import Linear
from workers.protocol.specs import Quant


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What all layers share in one forward pass. ``ropes``: the entries of the model's rotary tables for this step, one a table."""

    kernels: Kernels[Any]
    layout: AttentionLayout | DeviceLayout
    ropes: tuple[Tensor, ...]
    group: Group
    allreduce_norm: FusedAllReduceNorm | None

    def norm(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, fp8: bool) -> Tensor | Fp8Rows:
        """``residual`` [T, hidden] += sum of all ranks' ``branch`` in place; returns its norm times ``weight``, in FP8 if ``fp8``."""
        if branch is not None:
            if self.allreduce_norm is not None and self.allreduce_norm.supports(branch):
                return self.allreduce_norm(residual, branch, weight, eps, fp8=fp8)
            branch = self.group.all_reduce(branch)
        norm = self.kernels.add_rms_norm_fp8 if fp8 else self.kernels.add_rms_norm
        return norm(residual, branch, weight, eps)


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

    def vector(self, name: str) -> Tensor:
        return torch.empty(self._shapes[f"{name}.weight"], dtype=self._dtype, device=self._device)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized tensor that no file holds."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)
