"""Linear layers and the vocabulary head of one rank.

Owns the weights that the loader fills, part by part. Must never communicate: the stage sums over ranks.
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
DTYPES = {TORCH[dtype]: dtype for dtype in DTYPE_BYTES}
#: Rows of every product in fixed-shape mode, so that the bits of a row don't depend on how many other rows there are.
FIXED_ROWS = 16


class Linear:
    """y = x W^T + b. The loader fills :meth:`parts`; :meth:`freeze` then brings them into the form that is fastest on this device, and only
    that form stays in memory."""

    def __init__(
        self, out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device, quant: Quant = PLAIN
    ) -> None:
        self._dtype, self._device, self._form = dtype, device, quant.weights
        #: Whether the layer takes :class:`Fp8Rows`, so that the product need not convert its input.
        self.takes_fp8 = quant.weights == "fp8" and device.type == "cuda"
        self._parts = {
            part.suffix: torch.empty(part.shape(out_features, in_features), dtype=TORCH[part.format], device=device)
            for part in parts_of(quant, DTYPES[dtype])
        }
        self._bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self._product: Product | None = None

    def parts(self) -> dict[str, Tensor]:
        """The tensors that the loader fills, by checkpoint suffix: ``weight``, ``bias`` if there is one, scales if quantized."""
        return self._parts if self._bias is None else self._parts | {"bias": self._bias}

    def share(self, weight: Tensor) -> None:
        """Use ``weight`` [out, in] of another layer, which the loader fills there."""
        self._parts = {"weight": weight}

    def freeze(self, *, fixed_rows: bool) -> None:
        """Make the product of the filled parts, which are dropped. ``fixed_rows``: compute it in tiles of exactly ``FIXED_ROWS`` rows."""
        product = product_for(self._device)(self._form, self._parts, self._bias, self._dtype)
        self._product = in_fixed_tiles(product) if fixed_rows else product
        self._parts = {}

    def __call__(self, x: Tensor | Fp8Rows) -> Tensor:
        """[T, out] of ``x`` [T, in]."""
        assert self._product is not None, "not frozen"
        return self._product(x)


def in_fixed_tiles(product: Product) -> Product:
    """``product``, computed in tiles of exactly ``FIXED_ROWS`` rows."""

    def tiled(x: Tensor | Fp8Rows) -> Tensor:
        if isinstance(x, Fp8Rows):
            return product(x)
        rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -rows % FIXED_ROWS))
        return torch.cat([product(tile) for tile in torch.split(padded, FIXED_ROWS)])[:rows]

    return tiled


class VocabHead:
    """This rank's vocabulary rows of the output projection, of which ``real`` are not padding; logits of padding rows are -inf."""

    def __init__(self, real: int, linear: Linear) -> None:
        self._real, self.linear = real, linear

    def __call__(self, hidden: Tensor, *, divisor: float = 1.0, softcap: float | None = None) -> Tensor:
        """[S, rows] logits of ``hidden`` [S, hidden_size] in its dtype: divided by ``divisor``, then bounded to ``softcap``."""
        logits = self.linear(hidden)
        if divisor != 1.0:
            logits.div_(divisor)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        logits[:, self._real :] = -torch.inf
        return logits
