"""The Stage protocol: a runner's interface to every model family."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from workers.kernels.reference import AttentionLayout
from workers.kernels.step_layout import DeviceLayout
from workers.layout.sharding import Shard
from workers.protocol.specs import ModelSpec


class Stage(Protocol):
    """One pipeline stage on one rank. Lifecycle: construct, fill :meth:`parameters`, :meth:`freeze`, then run."""

    model: ModelSpec
    shard: Shard
    dtype: torch.dtype
    device: torch.device

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of this rank by its checkpoint name, for the loader to fill in place."""

    def freeze(self, *, fixed_rows: bool = False) -> None:
        """Bring the filled parameters into the form that is computed with; those of :meth:`parameters` are invalid afterwards.
        ``fixed_rows``: compute every product in tiles of a fixed number of rows."""

    def embed(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, hidden] of ``tokens`` [T], in ``out`` if given; first stage only."""

    def forward(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """Run ``hidden`` [T, hidden] through the layers in place and return it. ``layout``: of this device's kind; ``cache``: one tensor a
        layer; where it has fewer, only the first layers run."""

    def decode(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """:meth:`forward` and then :meth:`head` of every token, with the same bits in fewer kernels; last stage only."""

    def head(self, hidden: Tensor) -> Tensor:
        """[S, vocabulary rows of this rank]: logits of ``hidden`` [S, hidden] in the model's dtype; last stage only."""

    def logits(self, hidden: Tensor) -> Tensor:
        """:meth:`head` in fp32."""
