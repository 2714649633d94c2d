"""One pipeline stage of a decoder, whatever its family: layers of the kinds that the model's spec names.

Owns the parameters of its shard. Only the residual stream leaves a stage, so pipelines are bitwise equal to one stage. Must never know of
requests, slots or sampling; the KV cache that it writes belongs to the runner.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.kernels import Kernels, kernels_for
from workers.kernels.linear import Fp8Rows
from workers.kernels.reference import AttentionLayout
from workers.kernels.step_layout import DeviceLayout
from workers.layout.declaration import HEAD, LAST_NORM, PREFIXES, VOCAB_EMBEDDING
from workers.layout.sharding import Shard, shares_embedding, tensors_of
from workers.models.attention import Attention
from workers.models.context import BlockParts, ForwardContext
from workers.models.layers import Linear, VocabHead
from workers.models.mlp import Mlp
from workers.models.moe import Moe
from workers.models.norm import ResidualNorm
from workers.models.rope import attention_factor, rope_angles
from workers.protocol.specs import PLAIN, LayerSpec, MlpSpec, ModelSpec, Parallel, Quant


class DecoderLayer:
    """Attention and MLP of one layer, with the norms around them."""

    def __init__(self, model: ModelSpec, spec: LayerSpec, shard: Shard, parts: BlockParts) -> None:
        self._multiplier, self._parallel = model.residual_multiplier, spec.parallel
        self.attention = Attention(model, spec.attention, shard, parts)
        self.mlp = Mlp(spec.mlp, parts) if isinstance(spec.mlp, MlpSpec) else Moe(spec.mlp, shard, parts)
        self._norms: list[ResidualNorm] = []
        norm = partial(self._norm, model, parts)
        self._before_attention = norm("input_layernorm") if spec.pre_norm else None
        self._before_mlp = norm("post_layernorm") if spec.pre_norm and not spec.parallel else None
        self._after_attention = norm("post_self_attn_layernorm") if spec.post_norm else None
        self._after_mlp = norm("post_mlp_layernorm") if spec.post_norm else None

    def _norm(self, model: ModelSpec, parts: BlockParts, name: str) -> ResidualNorm:
        self._norms.append(ResidualNorm(model, parts, name))
        return self._norms[-1]

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer."""
        found = self.attention.parameters() | self.mlp.parameters()
        for norm in self._norms:
            found |= norm.parameters()
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`DecoderStage.freeze`."""
        self.attention.freeze(fixed_rows=fixed_rows)
        self.mlp.freeze(fixed_rows=fixed_rows)
        for norm in self._norms:
            norm.freeze()

    def __call__(self, residual: Tensor, branch: Tensor | None, cache: Tensor, step: ForwardContext) -> Tensor | None:
        """Add to ``residual`` [T, hidden], in place, the sum of all ranks' ``branch`` and this layer's attention. Returns this rank's part
        of the MLP's output [T, hidden], neither summed over ranks nor added; None where it is added already."""
        entered = self._enter(residual, branch, self._before_attention, step, fp8=self.attention.qkv.takes_fp8)
        attended = self.attention(entered, cache, step)
        if self._parallel:
            return self._leave(residual, attended.add_(self.mlp(entered, step)), None, step)
        branch = self._leave(residual, attended, self._after_attention, step)
        mixed = self.mlp(self._enter(residual, branch, self._before_mlp, step, fp8=self.mlp.takes_fp8), step)
        return self._leave(residual, mixed, self._after_mlp, step)

    def _enter(
        self, residual: Tensor, branch: Tensor | None, norm: ResidualNorm | None, step: ForwardContext, *, fp8: bool
    ) -> Tensor | Fp8Rows:
        """The input of a block, with ``branch`` added to ``residual``."""
        if norm is not None:
            return norm(residual, branch, step, fp8=fp8)
        return residual if branch is None else residual.add_(step.group.all_reduce(branch))

    def _leave(self, residual: Tensor, branch: Tensor, norm: ResidualNorm | None, step: ForwardContext) -> Tensor | None:
        """The part of a block's output that is not added yet."""
        if norm is not None:
            branch = norm.of(step.group.all_reduce(branch), step.kernels)
        if self._multiplier != 1.0:
            branch.mul_(self._multiplier)
        if norm is None:
            return branch
        residual.add_(branch)
        return None


class DecoderStage:
    """The layers of one (pp rank, tp rank), with the embedding on the first stage and the head on the last.

    ``group``: the tp ranks of this stage; ``positions``: tokens of the longest sequence; ``kernels``: instead of the device's own.
    Lifecycle: construct, fill :meth:`parameters`, :meth:`freeze`, then run.
    """

    def __init__(
        self,
        model: ModelSpec,
        parallel: Parallel,
        shard: Shard,
        group: Group,
        *,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        quant: Quant = PLAIN,
        kernels: Kernels[Any] | None = None,
    ) -> None:
        self.model, self.shard, self._group = model, shard, group
        self.dtype, self.device = dtype, device
        self.layers = self._make_layers(parallel, quant)
        self._kernels = kernels or kernels_for(device)
        self._allreduce_norm = group.allreduce_norm(model.hidden_size)
        self._ropes = tuple(
            self._kernels.rope_table(rope_angles(rope, positions), dtype, attention_factor(rope)).to(device) for rope in model.ropes
        )
        self._tied = shares_embedding(model, parallel)
        self._embedding: Tensor | None = None
        self._head: VocabHead | None = None
        self._norm: ResidualNorm | None = None
        if shard.first:
            self._embedding = torch.empty(shard.vocab_rows, model.hidden_size, dtype=dtype, device=device)
        if shard.last:
            shapes = {tensor.name: tensor.shape for tensor in tensors_of(model, parallel, shard)}
            self._norm = ResidualNorm(model, BlockParts(shapes, dtype, device, PLAIN), LAST_NORM)
            rows = 0 if self._tied else shard.vocab_rows
            self._head = VocabHead(shard.vocab.size, Linear(rows, model.hidden_size, bias=False, dtype=dtype, device=device))

    def _make_layers(self, parallel: Parallel, quant: Quant) -> list[DecoderLayer]:
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        for tensor in tensors_of(self.model, parallel, self.shard):
            if tensor.name.startswith(PREFIXES.checkpoint):
                number, name = tensor.name.removeprefix(PREFIXES.checkpoint).split(".", 1)
                shapes.setdefault(int(number), {})[name] = tensor.shape
        return [
            DecoderLayer(
                self.model, self.model.layer(self.shard.layers.start + local), self.shard, BlockParts(each, self.dtype, self.device, quant)
            )
            for local, each in shapes.items()
        ]

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of this rank by its checkpoint name, for the loader to fill in place."""
        found: dict[str, Tensor] = {}
        if self._embedding is not None:
            found[VOCAB_EMBEDDING] = self._embedding
        for index, layer in enumerate(self.layers):
            found |= {f"{PREFIXES.checkpoint}{index}.{name}": tensor for name, tensor in layer.parameters().items()}
        if self._head is not None and self._norm is not None:
            found |= self._norm.parameters()
            if not self._tied:
                found[HEAD] = self._head.linear.parts()["weight"]
        return found

    def freeze(self, *, fixed_rows: bool = False) -> None:
        """Bring the filled parameters into the form that is computed with; those of :meth:`parameters` are invalid afterwards.
        ``fixed_rows``: compute every product in tiles of a fixed number of rows."""
        for layer in self.layers:
            layer.freeze(fixed_rows=fixed_rows)
        if self._head is not None and self._norm is not None:
            self._norm.freeze()
            if self._tied and self._embedding is not None:
                # A CPU repacks the head, so tied weights are in memory twice: as a table for the embedding, and packed for the product.
                self._head.linear.share(self._embedding)
            self._head.linear.freeze(fixed_rows=fixed_rows)

    def embed(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, hidden] of ``tokens`` [T], in ``out`` if given; first stage only."""
        if self._embedding is None:
            raise ValueError("only the first stage embeds")
        vocab = self.shard.vocab
        if out is None:
            out = torch.empty(len(tokens), self.model.hidden_size, dtype=self.dtype, device=self.device)
        self._kernels.embed(tokens, self._embedding, vocab.start, vocab.size, out)
        if self._group.size > 1:
            out.copy_(self._group.all_reduce(out))
        if self.model.embedding_multiplier != 1.0:
            # Rounded to the dtype first, as the models were trained with it.
            out.mul_(torch.tensor(self.model.embedding_multiplier, dtype=self.dtype).item())
        return out

    def forward(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """Run ``hidden`` [T, hidden] through the layers in place and return it. ``layout``: of this device's kind; ``cache``: one tensor a
        layer; where it has fewer, only the first layers run."""
        _, branch = self._layers(hidden, layout, cache)
        # The stage completes the sum before it sends: if the next stage did, the bits would depend on where a pipeline is split.
        return hidden if branch is None else hidden.add_(self._group.all_reduce(branch))

    def _layers(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> tuple[ForwardContext, Tensor | None]:
        """Run the layers; returns (context, the last branch), which is still to be summed over ranks and added to ``hidden``."""
        ropes = tuple(self._kernels.rope_rows(table, layout) for table in self._ropes)
        step = ForwardContext(self._kernels, layout, ropes, self._group, self._allreduce_norm)
        branch: Tensor | None = None
        for layer, blocks in zip(self.layers, cache, strict=False):
            branch = layer(hidden, branch, blocks, step)
        return step, branch

    def decode(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """:meth:`forward` and then :meth:`head` of every token, with the same bits in fewer kernels; last stage only."""
        step, branch = self._layers(hidden, layout, cache)
        head, norm = self._last()
        normed = norm(hidden, branch, step)
        assert isinstance(normed, Tensor)
        return self._logits(head, normed)

    def head(self, hidden: Tensor) -> Tensor:
        """[S, vocabulary rows of this rank]: logits of ``hidden`` [S, hidden] in the model's dtype; last stage only."""
        head, norm = self._last()
        return self._logits(head, norm.of(hidden, self._kernels))

    def _last(self) -> tuple[VocabHead, ResidualNorm]:
        if self._head is None or self._norm is None:
            raise ValueError("only the last stage makes logits")
        return self._head, self._norm

    def _logits(self, head: VocabHead, normed: Tensor) -> Tensor:
        return head(normed, divisor=self.model.logits_divisor, softcap=self.model.logits_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """:meth:`head` in fp32."""
        return self.head(hidden).float()
