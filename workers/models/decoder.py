"""One pipeline stage of a llama-family decoder: llama, mistral, qwen2 (q/k/v biases), qwen3 (q/k norms).

Owns the parameters of its shard. Only the residual stream leaves a stage, so pipelines are bitwise equal to one stage. Must never know of
requests, slots or sampling; the KV cache that it writes belongs to the runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.distributed.group import FusedAllReduceNorm, Group
from workers.kernels import Kernels, kernels_for
from workers.kernels.linear import Fp8Rows
from workers.kernels.reference import AttentionLayout
from workers.kernels.step_layout import DeviceLayout
from workers.layout.sharding import Shard, shares_embedding
from workers.models.layers import Linear, VocabHead
from workers.models.rope import rope_angles
from workers.protocol.specs import PLAIN, ModelSpec, Parallel, Quant


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What all layers share in one forward pass."""

    kernels: Kernels[Any]
    layout: AttentionLayout | DeviceLayout
    rope: Tensor
    group: Group
    allreduce_norm: FusedAllReduceNorm | None

    def norm(self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, fp8: bool) -> Tensor | Fp8Rows:
        """``residual`` [T, hidden] += sum of all ranks' ``branch`` in place; returns its norm times ``weight``, in FP8 if ``fp8``."""
        if branch is not None:
            if self.allreduce_norm is not None and self.allreduce_norm.supports(branch):
                return self.allreduce_norm(residual, branch, weight, eps, fp8=fp8)
            branch = self.group.all_reduce(branch)
        norm = self.kernels.add_rms_norm_fp8 if fp8 else self.kernels.add_rms_norm
        return norm(residual, branch, weight, eps)


class DecoderLayer:
    """Attention and MLP of one layer: this tp rank's heads and FFN columns."""

    def __init__(self, model: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device, quant: Quant) -> None:
        self._heads, self._kv, self._dim, self._eps = shard.heads.size, shard.kv_heads.size, model.head_dim, model.rms_norm_eps

        def linear(out_features: int, in_features: int, bias: bool = False) -> Linear:
            return Linear(out_features, in_features, bias=bias, dtype=dtype, device=device, quant=quant)

        def norm(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.input_norm, self.post_norm = norm(model.hidden_size), norm(model.hidden_size)
        self.qkv = linear((self._heads + 2 * self._kv) * self._dim, model.hidden_size, model.qkv_bias)
        self.dense = linear(model.hidden_size, self._heads * self._dim)
        self.gate_up = linear(2 * shard.ffn.size, model.hidden_size)
        self.down = linear(model.hidden_size, shard.ffn.size)
        # One weight row for each head, the query heads' rows first, so that both norms are one operation.
        self.qk_norm = torch.empty(self._heads + self._kv, self._dim, dtype=dtype, device=device) if model.qk_norm else None
        self.q_norm = norm(self._dim) if model.qk_norm else None
        self.k_norm = norm(self._dim) if model.qk_norm else None

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer. TensorRT-LLM calls the input of the activation ``mlp.fc``."""
        found = {"input_layernorm.weight": self.input_norm, "post_layernorm.weight": self.post_norm}
        for name, linear in (("attention.qkv", self.qkv), ("attention.dense", self.dense), ("mlp.proj", self.down)):
            found |= {f"{name}.{suffix}": part for suffix, part in linear.parts().items()}
        for suffix, part in self.gate_up.parts().items():
            found[f"mlp.fc.{suffix}"], found[f"mlp.gate.{suffix}"] = part.chunk(2)
        if self.q_norm is not None and self.k_norm is not None:
            found |= {"attention.q_layernorm.weight": self.q_norm, "attention.k_layernorm.weight": self.k_norm}
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        """See :meth:`DecoderStage.freeze`."""
        for linear in (self.qkv, self.dense, self.gate_up, self.down):
            linear.freeze(fixed_rows=fixed_rows)
        if self.qk_norm is not None and self.q_norm is not None and self.k_norm is not None:
            self.qk_norm[: self._heads], self.qk_norm[self._heads :] = self.q_norm, self.k_norm

    def __call__(self, residual: Tensor, branch: Tensor | None, cache: Tensor, step: ForwardContext) -> Tensor:
        """Add to ``residual`` [T, hidden], in place, the sum of all ranks' ``branch`` and this layer's attention. Returns this rank's part
        of the MLP's output [T, hidden], neither summed over ranks nor added."""
        kernels = step.kernels
        normed = step.norm(residual, branch, self.input_norm, self._eps, fp8=self.qkv.takes_fp8)
        qkv = self.qkv(normed).view(-1, self._heads + 2 * self._kv, self._dim)
        kernels.rope_store(qkv, cache, step.rope, step.layout, self.qk_norm, self._eps)
        attended = self.dense(kernels.paged_attention(qkv[:, : self._heads], cache, step.layout))
        gate_up = self.gate_up(step.norm(residual, attended, self.post_norm, self._eps, fp8=self.gate_up.takes_fp8))
        mixed = kernels.silu_mul_fp8(gate_up) if self.down.takes_fp8 else kernels.silu_mul(gate_up)
        return self.down(mixed)


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
        self.layers = [DecoderLayer(model, shard, dtype, device, quant) for _ in range(shard.layers.size)]
        self._kernels = kernels or kernels_for(device)
        self._allreduce_norm = group.allreduce_norm(model.hidden_size)
        self._rope = self._kernels.rope_table(rope_angles(model, positions), dtype).to(device)
        self._tied = shares_embedding(model, parallel)
        self._embedding: Tensor | None = None
        self._head: VocabHead | None = None
        self._norm = torch.empty(model.hidden_size, dtype=dtype, device=device)
        if shard.first:
            self._embedding = torch.empty(shard.vocab_rows, model.hidden_size, dtype=dtype, device=device)
        if shard.last:
            rows = 0 if self._tied else shard.vocab_rows
            self._head = VocabHead(shard.vocab.size, Linear(rows, model.hidden_size, bias=False, dtype=dtype, device=device))

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of this rank by its checkpoint name, for the loader to fill in place."""
        found: dict[str, Tensor] = {}
        if self._embedding is not None:
            found["transformer.vocab_embedding.weight"] = self._embedding
        for index, layer in enumerate(self.layers):
            found |= {f"transformer.layers.{index}.{name}": tensor for name, tensor in layer.parameters().items()}
        if self._head is not None:
            found["transformer.ln_f.weight"] = self._norm
            if not self._tied:
                found["lm_head.weight"] = self._head.linear.parts()["weight"]
        return found

    def freeze(self, *, fixed_rows: bool = False) -> None:
        """Bring the filled parameters into the form that is computed with; those of :meth:`parameters` are invalid afterwards.
        ``fixed_rows``: compute every product in tiles of a fixed number of rows."""
        for layer in self.layers:
            layer.freeze(fixed_rows=fixed_rows)
        if self._head is not None:
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
        return out if self._group.size == 1 else out.copy_(self._group.all_reduce(out))

    def forward(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """Run ``hidden`` [T, hidden] through the layers in place and return it. ``layout``: of this device's kind; ``cache``: one tensor a
        layer; where it has fewer, only the first layers run."""
        _, branch = self._layers(hidden, layout, cache)
        # The stage completes the sum before it sends: if the next stage did, the bits would depend on where a pipeline is cut.
        return hidden if branch is None else hidden.add_(self._group.all_reduce(branch))

    def _layers(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> tuple[ForwardContext, Tensor | None]:
        """Run the layers; returns (context, the last branch), which is still to be summed over ranks and added to ``hidden``."""
        step = ForwardContext(self._kernels, layout, self._kernels.rope_rows(self._rope, layout), self._group, self._allreduce_norm)
        branch: Tensor | None = None
        for layer, blocks in zip(self.layers, cache, strict=False):
            branch = layer(hidden, branch, blocks, step)
        return step, branch

    def decode(self, hidden: Tensor, layout: AttentionLayout | DeviceLayout, cache: list[Tensor]) -> Tensor:
        """:meth:`forward` and then :meth:`head` of every token, with the same bits in fewer kernels; last stage only."""
        step, branch = self._layers(hidden, layout, cache)
        normed = step.norm(hidden, branch, self._norm, self.model.rms_norm_eps, fp8=False)
        assert isinstance(normed, Tensor)
        return self._logits(normed)

    def head(self, hidden: Tensor) -> Tensor:
        """[S, vocabulary rows of this rank]: logits of ``hidden`` [S, hidden] in the model's dtype; last stage only."""
        return self._logits(self._kernels.add_rms_norm(hidden, None, self._norm, self.model.rms_norm_eps))

    def _logits(self, normed: Tensor) -> Tensor:
        if self._head is None:
            raise ValueError("only the last stage makes logits")
        return self._head(normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """:meth:`head` in fp32."""
        return self.head(hidden).float()
