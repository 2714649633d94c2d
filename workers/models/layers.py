"""Linear layers and vocabulary shards of one rank.

Owns the weights that the loader fills, part by part. Must never communicate: sums over ranks are the stage's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.kernels import product_for
from workers.kernels.linear import Fp8Rows, Product
from workers.layout.quant_parts import Format, parts_of
from workers.protocol.specs import DTYPE_BYTES, PLAIN, Quant

TORCH: dict[Format, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}
_DTYPES = {TORCH[dtype]: dtype for dtype in DTYPE_BYTES}
#: Rows that the fixed-shape mode gives to every product, so that a row's bits don't depend on how many others there are.
FIXED_ROWS = 16


class Linear:
    """y = x W^T + b. The loader fills :meth:`parts`; :meth:`freeze` then brings them into the form that is fastest on this device, which is
    the only one that stays in memory."""

    def __init__(
        self, out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device, quant: Quant = PLAIN
    ) -> None:
        self._dtype, self._device, self._form = dtype, device, quant.weights
        #: Whether :class:`Fp8Rows` rows may be given, which saves the product from narrowing them.
        self.takes_fp8 = quant.weights == "fp8" and device.type == "cuda"
        self._parts = {
            part.suffix: torch.empty(part.shape(out_features, in_features), dtype=TORCH[part.format], device=device)
            for part in parts_of(quant, _DTYPES[dtype])
        }
        self._bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self._fixed = False
        self._product: Product | None = None

    def parts(self) -> dict[str, Tensor]:
        """What the loader fills, by checkpoint suffix: ``weight``, ``bias`` if there is one, scales if quantized."""
        return self._parts if self._bias is None else self._parts | {"bias": self._bias}

    def share(self, weight: Tensor) -> None:
        """Multiply with ``weight`` [out, in], which another layer owns and the loader fills there."""
        self._parts = {"weight": weight}

    def freeze(self, *, fixed_rows: bool) -> None:
        """Fix the filled parts for good. ``fixed_rows``: compute products in tiles of ``FIXED_ROWS`` rows only."""
        self._fixed = fixed_rows
        self._product = product_for(self._device)(self._form, self._parts, self._bias, self._dtype)
        self._parts = {}

    def __call__(self, x: Tensor | Fp8Rows) -> Tensor:
        assert self._product is not None, "not frozen"
        if isinstance(x, Fp8Rows) or not self._fixed:
            return self._product(x)
        rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -rows % FIXED_ROWS))
        return torch.cat([self._product(tile) for tile in torch.split(padded, FIXED_ROWS)])[:rows]


class VocabHead:
    """This rank's rows of the output projection; logits of padding rows are -inf."""

    def __init__(self, real: int, linear: Linear) -> None:
        self._real, self.linear = real, linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, rows] logits of ``hidden`` [R, hidden] in its dtype."""
        logits = self.linear(hidden)
        logits[:, self._real :] = -torch.inf
        return logits
