"""The device operations of a decoder layer, behind one protocol: model code is the same for every device.

Owns the protocol and the choice of the implementation. :mod:`.reference` is plain torch and defines the results; :mod:`.gpu` is Triton, and
is imported only on a GPU. A layout is opaque to the model: each device has its own kind. Must never know about requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from workers.kernels import experts, linear, reference
from workers.kernels.experts import MakeExperts
from workers.kernels.linear import Fp8Rows, Parts, Product
from workers.protocol.specs import Activation, QuantName

Layout = TypeVar("Layout", contravariant=True)


class Kernels(Protocol[Layout]):
    """Operations on the T query tokens of a step. ``cache`` [blocks, block_size, 2 * kv_heads, dim]: keys' heads before values' heads."""

    def embed(self, tokens: Tensor, weight: Tensor, start: int, count: int, out: Tensor) -> None:
        """Write to ``out`` [T, hidden] the embeddings of ``tokens`` [T]. Rows [0, count) of ``weight`` [rows, hidden] embed the ids [start,
        start + count). Tokens outside that range give zeros; the all-reduce adds the rows of the other ranks."""

    def rope_table(self, angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """The rotary table in the form that this device reads, from ``angles`` [positions, rotated / 2] fp32, radians. Cosines and sines
        are multiplied by ``factor``."""

    def rope_rows(self, table: Tensor, layout: Layout) -> Tensor:
        """The part of ``table`` that :meth:`rope_store` reads in one step; made once for all layers."""

    def add_rms_norm(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """``residual`` [T, hidden] += ``branch`` in place, rounded; returns its root-mean-square norm, computed in fp32."""

    def add_rms_norm_fp8(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Fp8Rows:
        """:meth:`add_rms_norm` in FP8, for an FP8 product."""

    def add_layer_norm(self, residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """As :meth:`add_rms_norm`, with a LayerNorm: the mean is subtracted first, and ``bias`` [hidden] is added if given."""

    def rope_store(self, qkv: Tensor, cache: Tensor, rope: Tensor | None, layout: Layout, norm: Tensor | None, eps: float) -> None:
        """Norm each head of queries and keys by ``norm`` [heads + kv_heads, dim] if given, rotate as many components of them as ``rope``
        has (None = none), and write keys and values to ``cache``. Component i is paired with component i + rotated / 2.

        ``qkv`` [T, heads + 2 * kv_heads, dim] holds the rotated queries afterwards; its keys and values are invalid then.
        """

    def paged_attention(
        self,
        query: Tensor,
        cache: Tensor,
        layout: Layout,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """[T, heads * dim]: causal softmax attention of ``query`` [T, heads, dim] over ``cache``, which holds this step's tokens already.
        ``scale``: of the scores; None = dim ** -0.5. ``window``: each token attends to so many tokens, itself included; None = all.
        ``softcap``: scaled scores s become cap * tanh(s / cap)."""

    def activate(self, x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Tensor:
        """Activation of ``x`` [T, columns]; ``gated``: [T, columns], activation(first half) * second half of ``x`` [T, 2 * columns]."""

    def activate_fp8(self, x: Tensor, kind: Activation = "silu", *, gated: bool = True) -> Fp8Rows:
        """:meth:`activate` in FP8, for an FP8 product."""


def kernels_for(device: torch.device) -> Kernels[Any]:
    """The kernels of ``device``."""
    if device.type != "cuda":
        return reference
    from workers.kernels import gpu

    return gpu


def product_for(device: torch.device) -> Callable[[QuantName | None, Parts, Tensor | None, torch.dtype], Product]:
    """The function that makes linear layers' products on ``device``; its signature is that of :func:`workers.kernels.linear.product`."""
    if device.type != "cuda":
        return linear.product
    from workers.kernels import linear_gpu

    return linear_gpu.product


def experts_for(device: torch.device) -> MakeExperts:
    """What makes the experts of a mixture on ``device``."""
    if device.type != "cuda":
        return experts.CpuExperts
    from workers.kernels import experts_gpu

    return experts_gpu.GpuExperts
