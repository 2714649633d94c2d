"""Grouped-query attention of one layer: this tp rank's heads.

Owns the parameters that the loader fills. Must never sum its output over ranks: the layer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.linear import Fp8Rows
from workers.layout.sharding import Shard, kv_copies
from workers.models.context import BlockParts, ForwardContext
from workers.models.norm import norm_weight
from workers.protocol.specs import AttentionSpec, ModelSpec


class Attention:
    """``table``: which of the model's rotary tables turns queries and keys; None = none does."""

    def __init__(self, model: ModelSpec, spec: AttentionSpec, shard: Shard, parts: BlockParts) -> None:
        self._heads, self._kv, self._dim, self._eps = shard.heads.size, shard.kv_heads.size, model.head_dim, model.rms_norm_eps
        self._spec, self._plus_one = spec, model.norm.plus_one
        self._table = None if spec.rope is None else model.ropes.index(spec.rope)
        self.qkv, self.dense = parts.linear("attention.qkv"), parts.linear("attention.dense")
        normed = spec.qk_norm is not None
        self._q_norm = norm_weight(model.norm, parts, "attention.q_layernorm") if normed else None
        self._k_norm = norm_weight(model.norm, parts, "attention.k_layernorm") if normed else None
        # One weight row for each head, the query heads' rows first, so that both norms are one operation.
        self._norm = parts.empty(self._heads + self._kv, self._dim, exact=model.norm.plus_one) if normed else None
        self._width_norm = WidthNorm(model, shard) if spec.qk_norm == "width" else None

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer."""
        found = {f"attention.qkv.{suffix}": part for suffix, part in self.qkv.parts().items()}
        found |= {f"attention.dense.{suffix}": part for suffix, part in self.dense.parts().items()}
        if self._q_norm is not None and self._k_norm is not None:
            found |= {"attention.q_layernorm.weight": self._q_norm, "attention.k_layernorm.weight": self._k_norm}
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`workers.models.stage.Stage.freeze`."""
        self.qkv.freeze(fixed_rows=fixed_rows)
        self.dense.freeze(fixed_rows=fixed_rows)
        if self._norm is not None and self._q_norm is not None and self._k_norm is not None:
            # A norm of each head has one row of weights for all heads, a norm of the whole width a row for each.
            self._norm[: self._heads] = self._q_norm.view(-1, self._dim)
            self._norm[self._heads :] = self._k_norm.view(-1, self._dim)
            if self._plus_one:
                self._norm += 1.0

    def __call__(self, normed: Tensor | Fp8Rows, cache: Tensor, step: ForwardContext) -> Tensor:
        """This rank's part of the output [T, hidden]."""
        qkv, norm = self.qkv(normed).view(-1, self._heads + 2 * self._kv, self._dim), self._norm
        if self._width_norm is not None and norm is not None:
            self._width_norm(qkv, norm, self._eps, step)
            norm = None
        rope = None if self._table is None else step.ropes[self._table]
        step.kernels.rope_store(qkv, cache, rope, step.layout, norm, self._eps)
        attended = step.kernels.paged_attention(
            qkv[:, : self._heads], cache, step.layout, scale=self._spec.scale, window=self._spec.window, softcap=self._spec.softcap
        )
        return self.dense(attended)


class WidthNorm:
    """Norms of queries and of keys over all their heads, those of other ranks included."""

    def __init__(self, model: ModelSpec, shard: Shard) -> None:
        self._heads, self._kv, self._dim = shard.heads.size, shard.kv_heads.size, model.head_dim
        self._widths = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
        # Several ranks may have a key head; its squares are summed once.
        self._share = 1.0 / kv_copies(model, shard)

    def __call__(self, qkv: Tensor, weights: Tensor, eps: float, step: ForwardContext) -> None:
        """Norm in place the queries and keys of ``qkv`` [T, heads + 2 * kv_heads, dim]. ``weights`` [heads + kv_heads, dim]."""
        queries, keys = qkv[:, : self._heads], qkv[:, self._heads : self._heads + self._kv]
        sums = torch.stack((queries.float().square().sum((1, 2)), keys.float().square().sum((1, 2)) * self._share), 1)
        sums = step.group.all_reduce(sums)
        for heads, rows, width, total in (
            (queries, weights[: self._heads], self._widths[0], sums[:, 0]),
            (keys, weights[self._heads :], self._widths[1], sums[:, 1]),
        ):
            rate = torch.rsqrt(total / width + eps).view(-1, 1, 1)
            heads.copy_((heads.float() * rate).to(heads.dtype).mul_(rows))
