"""The norms of a decoder: of the residual stream, with the sum before it, and of the heads of queries and keys.

Owns the conversion of stored weights to those that kernels use. Must never store a partial sum of one rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workers.kernels import Kernels
from workers.kernels.linear import Fp8Rows
from workers.models.context import BlockParts, ForwardContext
from workers.protocol.specs import ModelSpec, NormSpec


def norm_weight(spec: NormSpec, parts: BlockParts, name: str) -> Tensor:
    """The weight ``name`` for the loader to fill. Weights that lack 1 are kept in fp32: 1 + w has more digits than w in half precision."""
    return parts.vector(f"{name}.weight", exact=spec.plus_one)


class ResidualNorm:
    """A norm of the residual stream ``name``, as the model's spec says: RMSNorm or LayerNorm."""

    def __init__(self, model: ModelSpec, parts: BlockParts, name: str) -> None:
        self._spec, self._eps, self._name = model.norm, model.rms_norm_eps, name
        self._weight = norm_weight(model.norm, parts, name) if model.norm.weight else parts.ones(model.hidden_size)
        self._bias = parts.vector(f"{name}.bias") if model.norm.bias else None

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer."""
        found = {f"{self._name}.weight": self._weight} if self._spec.weight else {}
        return found if self._bias is None else found | {f"{self._name}.bias": self._bias}

    def freeze(self) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        if self._spec.plus_one:
            self._weight += 1.0

    def __call__(self, residual: Tensor, branch: Tensor | None, step: ForwardContext, *, fp8: bool = False) -> Tensor | Fp8Rows:
        """``residual`` [T, hidden] += sum of all ranks' ``branch`` in place; returns its norm, in FP8 if ``fp8`` and there is a kernel for
        it."""
        if self._spec.centred:
            summed = None if branch is None else step.group.all_reduce(branch)
            return step.kernels.add_layer_norm(residual, summed, self._weight, self._bias, self._eps)
        if branch is not None:
            if step.allreduce_norm is not None and step.allreduce_norm.supports(branch):
                return step.allreduce_norm(residual, branch, self._weight, self._eps, fp8=fp8)
            branch = step.group.all_reduce(branch)
        norm = step.kernels.add_rms_norm_fp8 if fp8 else step.kernels.add_rms_norm
        return norm(residual, branch, self._weight, self._eps)

    def of(self, x: Tensor, kernels: Kernels[Any]) -> Tensor:
        """The norm of ``x`` [T, hidden], which is summed over ranks already."""
        if self._spec.centred:
            return kernels.add_layer_norm(x, None, self._weight, self._bias, self._eps)
        return kernels.add_rms_norm(x, None, self._weight, self._eps)
