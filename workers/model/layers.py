"""Linear layers and vocabulary shards of one rank.

Owns the weights' form in memory. Must never communicate: sums over ranks are the stage's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Rows that the fixed-shape mode gives to every product, so that a row's bits don't depend on how many others there are.
FIXED_ROWS = 16


class Linear:
    """y = x W^T + b. ``weight`` [out, in] is filled by the loader; :meth:`freeze` then brings it into the form that is fastest here.

    On a CPU that is oneDNN's blocked layout: measured on one core, 1.2 to 2.3 times the speed of a plain product at 1 to 32 rows. The
    plain weight is dropped, so a rank holds it once.
    """

    def __init__(self, out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self._fixed = False
        self._packed: Tensor | None = None

    def freeze(self, *, fixed_rows: bool) -> None:
        """Fix the filled weight for good. ``fixed_rows``: compute products in tiles of ``FIXED_ROWS`` rows only."""
        self._fixed = fixed_rows
        if self.weight.device.type == "cpu" and torch._C._has_mkldnn and self.weight.numel():
            # The row count is a hint for the layout only; any number of rows may follow.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, FIXED_ROWS)
            self.weight = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._fixed:
            return self._product(x)
        rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -rows % FIXED_ROWS))
        return torch.cat([self._product(tile) for tile in torch.split(padded, FIXED_ROWS)])[:rows]

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


class VocabEmbedding:
    """This rank's rows of the embedding: ``weight`` [rows, hidden], the first ``real`` of them tokens ``start``.., the rest padding."""

    def __init__(self, start: int, real: int, rows: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(rows, hidden, dtype=dtype, device=device)
        self._start, self._real = start, real

    def __call__(self, tokens: Tensor, *, whole: bool) -> Tensor:
        """[T, hidden] of ``tokens`` [T] int64; zeros for those that live elsewhere, whose owners add them. ``whole``: all live here."""
        if whole:
            return functional.embedding(tokens, self.weight)
        local = tokens - self._start
        mine = (local >= 0) & (local < self._real)
        return functional.embedding(local.clamp_(0, self.weight.shape[0] - 1), self.weight).mul_(mine.unsqueeze(1))


class VocabHead:
    """This rank's rows of the output projection; logits of padding rows are -inf."""

    def __init__(self, real: int, linear: Linear) -> None:
        self._real, self.linear = real, linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, rows] fp32 logits of ``hidden`` [R, hidden]."""
        logits = self.linear(hidden).float()
        logits[:, self._real :] = -torch.inf
        return logits
