"""The dense MLP of one layer: this tp rank's columns. Must never sum its output over ranks: the layer does."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.linear import Fp8Rows
from workers.models.context import BlockParts, ForwardContext
from workers.protocol.specs import MlpSpec


class Mlp:
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

    def __init__(self, spec: MlpSpec, parts: BlockParts, name: str = "mlp") -> None:
        """``name``: of the block within the layer."""
        self._spec, self._name = spec, name
        #: The product of what is activated, and after it of what it is multiplied by.
        self.gate_up = parts.linear(f"{name}.fc", f"{name}.gate") if spec.gated else parts.linear(f"{name}.fc")
        self.down = parts.linear(f"{name}.proj")

    @property
    def takes_fp8(self) -> bool:
        """Whether the block takes its input in FP8."""
        return self.gate_up.takes_fp8

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer. TensorRT-LLM calls the input of the activation ``mlp.fc``."""
        name = self._name
        found = {f"{name}.proj.{suffix}": part for suffix, part in self.down.parts().items()}
        for suffix, part in self.gate_up.parts().items():
            if self._spec.gated:
                found[f"{name}.fc.{suffix}"], found[f"{name}.gate.{suffix}"] = part.chunk(2)
            else:
                found[f"{name}.fc.{suffix}"] = part
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        self.gate_up.freeze(fixed_rows=fixed_rows)
        self.down.freeze(fixed_rows=fixed_rows)

    def __call__(self, normed: Tensor | Fp8Rows, step: ForwardContext) -> Tensor:
        """This rank's part of the output [T, hidden]."""
        activate = step.kernels.activate_fp8 if self.down.takes_fp8 else step.kernels.activate
        return self.down(activate(self.gate_up(normed), self._spec.activation, gated=self._spec.gated))
