"""Applies step plans on one rank with a CPU.

Owns the rank's state between steps: block tables, sampling state and the KV cache. Every rank sees every plan in the same order, so all
have the same tables. Must never decide anything: the plan says what runs, what is sampled and what is freed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.kernels.reference import TABLE_STEP, attention_layout
from workers.models.stage import Stage
from workers.runner.kv_cache import KvCache
from workers.runner.sampler import Sampler
from workers.runner.slot_sampling import SlotSampling
from workers.runner.step_results import PendingResult, ReadyResult
from workers.scheduler.step_plan import Ints, StepPlan, StepResult, view


class CpuRunner:
    """Implements :class:`~workers.runner.step_results.PlanRunner`; a step is done when :meth:`issue` returns.

    Args:
        stage: this rank's shard, frozen.
        pipeline: the ranks that hold the other stages of this tp rank, in stage order.
        tensor: the tp ranks of this stage.
        slots, max_seq_len: bounds of slot numbers and of a sequence's tokens.
        fixed_shape: compute every token in shapes that depend only on its position.
    """

    def __init__(
        self,
        stage: Stage,
        cache: KvCache,
        *,
        pipeline: Group,
        tensor: Group,
        slots: int,
        max_seq_len: int,
        eos_ids: tuple[int, ...] = (),
        fixed_shape: bool = False,
    ) -> None:
        #: This rank's part of the model; read-only for others.
        self.stage = stage
        self._cache, self._pipeline = cache, pipeline
        self._fixed_shape = fixed_shape
        width = -(-max_seq_len // TABLE_STEP) * TABLE_STEP // cache.block_size
        self._tables = np.full((slots, width), cache.padding_block, dtype=np.int32)
        self._filled = np.zeros(slots, dtype=np.int32)
        self._sampling: SlotSampling | None = None
        if stage.shard.last:
            sampler = Sampler(tensor, start=stage.shard.vocab.start, rows=stage.shard.vocab_rows, device=stage.device)
            self._sampling = SlotSampling(stage, sampler, eos_ids)

    def issue(self, plan: StepPlan) -> PendingResult | None:
        """See :class:`~workers.runner.step_results.PlanRunner`."""
        result = self.run(plan)
        return None if result is None else ReadyResult(result)

    def close(self) -> None:
        """Nothing is in flight between steps."""

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Apply ``plan``. Returns its result on the last stage, None on the others."""
        self._apply(plan)
        hidden = self._forward(plan) if plan.slots else None
        if self._sampling is None:
            return None
        return StepResult(step=plan.step) if hidden is None else self._sampling.result(plan, hidden)

    def _apply(self, plan: StepPlan) -> None:
        slots, starts = view(plan.slots), view(plan.starts)
        for slot in view(plan.closed).tolist():
            self._tables[slot] = self._cache.padding_block
            self._filled[slot] = 0
            if self._sampling is not None:
                self._sampling.close(slot)
        if self._sampling is not None:
            for opened in plan.opened:
                self._sampling.open(opened)
        if plan.block_slots:
            self._append(dict(zip(slots.tolist(), starts.tolist(), strict=True)), view(plan.block_slots), view(plan.block_ids))
        if self._sampling is not None:
            self._sampling.append_tokens(plan)

    def _append(self, starts: dict[int, int], slots: Ints, blocks: Ints) -> None:
        """Append ``blocks`` to the tables of ``slots``, and zero the new blocks (but not those of a prefix hit, which hold computed
        tokens).

        ``starts``: tokens that are computed already, by slot.
        """
        fresh: list[int] = []
        for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True):
            index = self._filled[slot]
            self._tables[slot, index] = block
            self._filled[slot] = index + 1
            if index * self._cache.block_size >= starts.get(slot, 0):
                fresh.append(block)
        if fresh:
            self._cache.clear(torch.tensor(fresh, device=self.stage.device))

    def _forward(self, plan: StepPlan) -> Tensor:
        stage, slots = self.stage, view(plan.slots)
        starts, lengths, tokens = view(plan.starts), view(plan.lengths), view(plan.tokens)
        layout = attention_layout(
            starts, lengths, self._tables[slots], self._cache.block_size, grouped=not self._fixed_shape, windows=stage.model.windows
        )
        if stage.shard.first:
            hidden = stage.embed(torch.from_numpy(tokens.astype(np.int64)).to(stage.device))
        else:
            hidden = torch.empty(len(tokens), stage.model.hidden_size, dtype=stage.dtype, device=stage.device)
            self._pipeline.recv(hidden, self._pipeline.rank - 1)
        hidden = stage.forward(hidden, layout, self._cache.layers)
        if not stage.shard.last:
            self._pipeline.send(hidden, self._pipeline.rank + 1)
        return hidden
