"""The dense MLP of one layer: this tp rank's columns. Must never sum its output over ranks: the layer does."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.linear import Fp8Rows
from workers.models.context import BlockParts, ForwardContext
from workers.protocol.specs import MlpSpec


class Mlp:
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

    def __init__(self, spec: MlpSpec, parts: BlockParts) -> None:
        self._spec = spec
        #: The product of what is activated, and after it of what it is multiplied by.
        self.gate_up = parts.linear("mlp.fc", "mlp.gate") if spec.gated else parts.linear("mlp.fc")
        self.down = parts.linear("mlp.proj")

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer. TensorRT-LLM calls the input of the activation ``mlp.fc``."""
        found = {f"mlp.proj.{suffix}": part for suffix, part in self.down.parts().items()}
        for suffix, part in self.gate_up.parts().items():
            if self._spec.gated:
                found[f"mlp.fc.{suffix}"], found[f"mlp.gate.{suffix}"] = part.chunk(2)
            else:
                found[f"mlp.fc.{suffix}"] = part
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        self.gate_up.freeze(fixed_rows=fixed_rows)
        self.down.freeze(fixed_rows=fixed_rows)

    def __call__(self, normed: Tensor | Fp8Rows, step: ForwardContext) -> Tensor:
        """This rank's part of the output [T, hidden]."""
        activate = step.kernels.activate_fp8 if self.down.takes_fp8 else step.kernels.activate
        return self.down(activate(self.gate_up(normed), self._spec.activation, gated=self._spec.gated))
