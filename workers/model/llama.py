"""One pipeline stage of a llama-family decoder: llama, mistral, qwen2 (q/k/v biases), qwen3 (q/k norms).

Owns its shard's parameters. The residual stream is the only thing that leaves a stage, so pipelines are bitwise equal to one stage. Must
never know of requests, slots or sampling; the cache it writes belongs to the runner.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.core.shard import Shard, shares_embedding
from workers.engine.comm import Group
from workers.model.kernels.reference import AttentionLayout, paged_attention, rms_norm, rotate, silu_mul, store
from workers.model.layers import Linear, VocabEmbedding, VocabHead
from workers.model.rope import rope_tables
from workers.spec import ModelSpec, Parallel


class DecoderLayer:
    """Attention and MLP of one layer, this tp rank's heads and FFN columns."""

    def __init__(self, model: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device) -> None:
        self._heads, self._kv, self._dim, self._eps = shard.heads.size, shard.kv_heads.size, model.head_dim, model.rms_norm_eps

        def linear(out_features: int, in_features: int, bias: bool = False) -> Linear:
            return Linear(out_features, in_features, bias=bias, dtype=dtype, device=device)

        def norm(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.input_norm, self.post_norm = norm(model.hidden_size), norm(model.hidden_size)
        self.qkv = linear((self._heads + 2 * self._kv) * self._dim, model.hidden_size, model.qkv_bias)
        self.dense = linear(model.hidden_size, self._heads * self._dim)
        self.gate_up = linear(2 * shard.ffn.size, model.hidden_size)
        self.down = linear(model.hidden_size, shard.ffn.size)
        # One weight row a head, the query heads' first, so that both norms are one operation.
        self.qk_norm = torch.empty(self._heads + self._kv, self._dim, dtype=dtype, device=device) if model.qk_norm else None
        self.q_norm = norm(self._dim) if model.qk_norm else None
        self.k_norm = norm(self._dim) if model.qk_norm else None

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their checkpoint names within the layer; ``mlp.fc`` is TensorRT-LLM's name for what the activation takes."""
        fc, gate = self.gate_up.weight.chunk(2)
        found = {
            "input_layernorm.weight": self.input_norm,
            "attention.qkv.weight": self.qkv.weight,
            "attention.dense.weight": self.dense.weight,
            "post_layernorm.weight": self.post_norm,
            "mlp.fc.weight": fc,
            "mlp.gate.weight": gate,
            "mlp.proj.weight": self.down.weight,
        }
        if self.qkv.bias is not None:
            found["attention.qkv.bias"] = self.qkv.bias
        if self.q_norm is not None and self.k_norm is not None:
            found |= {"attention.q_layernorm.weight": self.q_norm, "attention.k_layernorm.weight": self.k_norm}
        return found

    def freeze(self, *, fixed_rows: bool) -> None:
        for linear in (self.qkv, self.dense, self.gate_up, self.down):
            linear.freeze(fixed_rows=fixed_rows)
        if self.qk_norm is not None and self.q_norm is not None and self.k_norm is not None:
            self.qk_norm[: self._heads], self.qk_norm[self._heads :] = self.q_norm, self.k_norm

    def __call__(self, hidden: Tensor, cache: Tensor, layout: AttentionLayout, cosine: Tensor, sine: Tensor, group: Group) -> Tensor:
        """Add this layer's two branches to ``hidden`` [T, hidden] in place, and return it."""
        qkv = self.qkv(rms_norm(hidden, self.input_norm, self._eps)).view(-1, self._heads + 2 * self._kv, self._dim)
        turning = qkv[:, : self._heads + self._kv]
        if self.qk_norm is not None:
            turning.copy_(functional.rms_norm(turning, (self._dim,), None, self._eps).mul_(self.qk_norm))
        rotate(turning, cosine, sine)
        store(cache, qkv[:, self._heads :], layout.places)
        hidden += group.all_reduce(self.dense(paged_attention(qkv[:, : self._heads], cache, layout)))
        gate_up = self.gate_up(rms_norm(hidden, self.post_norm, self._eps))
        hidden += group.all_reduce(self.down(silu_mul(gate_up)))
        return hidden


class LlamaStage:
    """The layers of one (pp rank, tp rank), the embedding on the first stage and the head on the last.

    ``group``: the tp ranks of this stage. Lifecycle: construct, fill :meth:`parameters`, :meth:`freeze`, then run.
    """

    def __init__(
        self, model: ModelSpec, parallel: Parallel, shard: Shard, group: Group, *, dtype: torch.dtype, device: torch.device, positions: int
    ) -> None:
        self.model, self.shard, self._group = model, shard, group
        self.dtype, self.device = dtype, device
        self.layers = [DecoderLayer(model, shard, dtype, device) for _ in range(shard.layers.size)]
        self._cosine, self._sine = (table.to(device) for table in rope_tables(model, positions, dtype))
        self._tied = shares_embedding(model, parallel)
        self._embedding: VocabEmbedding | None = None
        self._head: VocabHead | None = None
        self._norm = torch.empty(model.hidden_size, dtype=dtype, device=device)
        if shard.first:
            vocab = shard.vocab
            self._embedding = VocabEmbedding(vocab.start, vocab.size, shard.vocab_rows, model.hidden_size, dtype=dtype, device=device)
        if shard.last:
            rows = 0 if self._tied else shard.vocab_rows
            self._head = VocabHead(shard.vocab.size, Linear(rows, model.hidden_size, bias=False, dtype=dtype, device=device))

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of this rank by its checkpoint name, to be filled in place."""
        found: dict[str, Tensor] = {}
        if self._embedding is not None:
            found["transformer.vocab_embedding.weight"] = self._embedding.weight
        for index, layer in enumerate(self.layers):
            found |= {f"transformer.layers.{index}.{name}": tensor for name, tensor in layer.parameters().items()}
        if self._head is not None:
            found["transformer.ln_f.weight"] = self._norm
            if not self._tied:
                found["lm_head.weight"] = self._head.linear.weight
        return found

    def freeze(self, *, fixed_rows: bool = False) -> None:
        """Bring the filled parameters into the form they run in; :meth:`parameters` means nothing afterwards."""
        for layer in self.layers:
            layer.freeze(fixed_rows=fixed_rows)
        if self._head is not None:
            if self._tied and self._embedding is not None:
                # A CPU's head is repacked, so tied rows are in memory twice: as a table to read and in the form to multiply with.
                self._head.linear.weight = self._embedding.weight
            self._head.linear.freeze(fixed_rows=fixed_rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """[T, hidden] of ``tokens`` [T]; first stage only."""
        if self._embedding is None:
            raise ValueError("only the first stage embeds")
        whole = self._group.size == 1
        hidden = self._embedding(tokens, whole=whole)
        return hidden if whole else self._group.all_reduce(hidden)

    def forward(self, hidden: Tensor, layout: AttentionLayout, cache: list[Tensor]) -> Tensor:
        """Run ``hidden`` [T, hidden] through this stage's layers, in place; ``cache``: one tensor a layer."""
        cosine = self._cosine[layout.positions].unsqueeze(1)
        sine = self._sine[layout.positions].unsqueeze(1)
        for layer, blocks in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, blocks, layout, cosine, sine, self._group)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, vocab rows of this rank] fp32 logits of ``hidden`` [R, hidden]; last stage only."""
        if self._head is None:
            raise ValueError("only the last stage makes logits")
        return self._head(rms_norm(hidden, self._norm, self.model.rms_norm_eps))
