"""The dense MLP of one layer: this tp rank's columns. Must never sum its output over ranks: the layer does."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.linear import Fp8Rows
from workers.models.context import BlockParts, ForwardContext


class Mlp:
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, parts: BlockParts) -> None:
        self.gate_up, self.down = parts.linear("mlp.fc", "mlp.gate"), parts.linear("mlp.proj")

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer. TensorRT-LLM calls the input of the activation ``mlp.fc``."""
        found = {f"mlp.proj.{suffix}": part for suffix, part in self.down.parts().items()}
        for suffix, part in self.gate_up.parts().items():
            found[f"mlp.fc.{suffix}"], found[f"mlp.gate.{suffix}"] = part.chunk(2)
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        self.gate_up.freeze(fixed_rows=fixed_rows)
        self.down.freeze(fixed_rows=fixed_rows)

    def __call__(self, normed: Tensor | Fp8Rows, step: ForwardContext) -> Tensor:
        """This rank's part of the output [T, hidden]."""
        gate_up = self.gate_up(normed)
        return self.down(step.kernels.silu_mul_fp8(gate_up) if self.down.takes_fp8 else step.kernels.silu_mul(gate_up))
