"""The device operations of a decoder layer, behind one seam: model code is the same for every device.

Owns the seam and the choice. :mod:`.reference` is plain torch and defines the results; :mod:`.gpu` is Triton, and imported only where a GPU
computes. A layout is opaque to the model: each device makes its own. Must never know about requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from workers.kernels import linear, reference
from workers.kernels.linear import Fp8Rows, Parts, Product
from workers.protocol.specs import QuantName

Layout = TypeVar("Layout", contravariant=True)


class Kernels(Protocol[Layout]):
    """T query tokens of a step; ``cache`` [blocks, block_size, 2 * kv_heads, dim], keys' heads before values'."""

    def embed(self, tokens: Tensor, weight: Tensor, start: int, count: int, out: Tensor) -> None:
        """Write to ``out`` [T, hidden] the lines of ``weight`` [rows, hidden] for ``tokens`` [T]: its first ``count`` are those of ids
        ``start``.., which other ids' ranks add theirs to, and zeros stand here."""

    def rope_table(self, angles: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotary table that this device reads, from ``angles`` [positions, dim / 2] fp32, radians."""

    def rope_rows(self, table: Tensor, layout: Layout) -> Tensor:
        """What :meth:`rope_store` needs of ``table`` in one step; made once for all layers."""

    def add_rms_norm(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """``residual`` [T, hidden] += ``branch`` in place, rounded; returns its root-mean-square norm, computed in fp32."""

    def add_rms_norm_fp8(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Fp8Rows:
        """:meth:`add_rms_norm`, narrowed for an FP8 product."""

    def rope_store(self, qkv: Tensor, cache: Tensor, rope: Tensor, layout: Layout, norm: Tensor | None, eps: float) -> None:
        """Norm each head of queries and keys by ``norm`` [heads + kv_heads, dim] if given, turn them, write keys and values to ``cache``.

        ``qkv`` [T, heads + 2 * kv_heads, dim] holds the turned queries afterwards; its keys and values mean nothing then.
        """

    def paged_attention(self, query: Tensor, cache: Tensor, layout: Layout) -> Tensor:
        """Causal softmax attention of ``query`` [T, heads, dim] over ``cache``, which holds this step's tokens; [T, heads * dim]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(first half) * second half of ``gate_up`` [T, 2 * columns]; [T, columns]."""

    def silu_mul_fp8(self, gate_up: Tensor) -> Fp8Rows:
        """:meth:`silu_mul`, narrowed for an FP8 product."""


def kernels_for(device: torch.device) -> Kernels[Any]:
    """The kernels of ``device``."""
    if device.type != "cuda":
        return reference
    from workers.kernels import gpu

    return gpu


def product_for(device: torch.device) -> Callable[[QuantName | None, Parts, Tensor | None, torch.dtype], Product]:
    """What makes a linear layer's product on ``device``: as :func:`workers.kernels.linear.product`."""
    if device.type != "cuda":
        return linear.product
    from workers.kernels import linear_gpu

    return linear_gpu.product
