"""The mixture of experts of one layer: this tp rank's experts, or its columns of all of them. Must never sum its output over ranks: the
layer does, once, however experts are distributed."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.experts import Experts, choose
from workers.kernels.linear import Fp8Rows
from workers.layout.declaration import ROUTER, SHARED_GATE
from workers.layout.sharding import Shard
from workers.models.context import BlockParts, ForwardContext
from workers.models.layers import in_fixed_tiles
from workers.models.mlp import Mlp
from workers.protocol.specs import MlpSpec, MoeSpec


class Moe:
    """Router in fp32, the experts that it chooses, and the shared expert if there is one. Every rank routes all tokens, since all have the
    same input."""

    #: The router reads the input as it is.
    takes_fp8 = False

    def __init__(self, spec: MoeSpec, shard: Shard, parts: BlockParts) -> None:
        self._spec, self._held = spec, shard.experts(spec.experts)
        self._router = parts.exact_linear(ROUTER)
        self._weights, self._make = parts.experts([f"mlp.experts.{number}" for number in range(self._held.start, self._held.stop)])
        self._experts: Experts | None = None
        self._shared = self._gate = None
        if spec.shared is not None:
            self._shared = Mlp(MlpSpec(size=spec.shared.size, activation=spec.activation), parts, "mlp.shared_expert")
            self._gate = parts.exact_linear(SHARED_GATE) if spec.shared.gated else None

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer."""
        found = {f"{ROUTER}.weight": self._router.parts()["weight"]}
        for index, number in enumerate(range(self._held.start, self._held.stop)):
            name = f"mlp.experts.{number}"
            for suffix, part in self._weights.gate_up.items():
                found[f"{name}.fc.{suffix}"], found[f"{name}.gate.{suffix}"] = part[index].chunk(2)
            found |= {f"{name}.proj.{suffix}": part[index] for suffix, part in self._weights.down.items()}
        if self._shared is not None:
            found |= self._shared.parameters()
        if self._gate is not None:
            found[f"{SHARED_GATE}.weight"] = self._gate.parts()["weight"]
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        self._router.freeze(fixed_rows=fixed_rows)
        tiled = in_fixed_tiles if fixed_rows else lambda product: product
        self._experts = self._make(self._weights, activation=self._spec.activation, first=self._held.start, tiled=tiled)
        del self._weights
        if self._shared is not None:
            self._shared.freeze(fixed_rows=fixed_rows)
        if self._gate is not None:
            self._gate.freeze(fixed_rows=fixed_rows)

    def __call__(self, normed: Tensor | Fp8Rows, step: ForwardContext) -> Tensor:
        """This rank's part of the output [T, hidden]."""
        assert self._experts is not None and isinstance(normed, Tensor), "not frozen, or given FP8"
        exact = normed.float()
        chosen = choose(self._router(exact), self._spec.experts_per_token, renormalise=self._spec.renormalise)
        out = self._experts(normed, chosen)
        if self._shared is not None:
            given = self._shared(normed, step)
            if self._gate is not None:
                given.mul_(torch.sigmoid(self._gate(exact)).to(given.dtype))
            out.add_(given)
        return out
