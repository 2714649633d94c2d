"""Applies step plans on one rank: the only owner of what a rank remembers between steps (block tables, sampling state, cache).

Every rank sees every plan, in the same order, and so holds the same tables. Must never decide anything: what runs, what is sampled and what
is freed is in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from workers.core.params import allowed_ids, has_penalties, stop_set
from workers.core.plan import F32, I32, Ints, OpenSlot, StepPlan, StepResult, view
from workers.engine.cache import KvCache
from workers.engine.comm import Group
from workers.engine.sampler import Draw, Sampler
from workers.model.kernels.reference import TABLE_STEP, attention_layout
from workers.model.llama import LlamaStage
from workers.wire import SamplingParams


@dataclass(slots=True)
class _Slot:
    """Sampling state of one row on a rank of the last stage. ``history``: prompt and output ids, kept only where sampling needs them;
    ``seen`` [rows] bool and ``counts`` [rows] float are its view on this rank's vocabulary rows."""

    params: SamplingParams
    prompt_len: int
    stops: tuple[int, ...]
    history: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    counts: Tensor | None = None


class _Sampling:
    """Turns hidden states of the last stage into a StepResult."""

    def __init__(self, stage: LlamaStage, sampler: Sampler, eos_ids: tuple[int, ...]) -> None:
        self._stage, self._sampler, self._eos_ids = stage, sampler, eos_ids
        self._slots: dict[int, _Slot] = {}

    def open(self, opened: OpenSlot) -> None:
        slot = _Slot(opened.params, opened.prompt_len, tuple(sorted(stop_set(opened.params, self._eos_ids))))
        if has_penalties(opened.params):
            slot.seen = torch.zeros(self._sampler.rows, dtype=torch.bool, device=self._stage.device)
            slot.counts = torch.zeros(self._sampler.rows, dtype=torch.float32, device=self._stage.device)
        self._slots[opened.slot] = slot
        self._remember(slot, view(opened.history).tolist())

    def close(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _remember(self, slot: _Slot, tokens: list[int]) -> None:
        first = len(slot.history)
        slot.history += tokens
        if slot.seen is None or slot.counts is None:
            return
        ids = np.asarray(tokens, np.int64)
        slot.seen[torch.from_numpy(self._sampler.local(ids))] = True
        output = torch.from_numpy(self._sampler.local(ids[max(slot.prompt_len - first, 0) :]))
        slot.counts.index_add_(0, output, torch.ones(len(output), device=slot.counts.device))

    def follow(self, number: int, start: int, tokens: Ints) -> None:
        """Take the row's new query ``tokens`` at positions ``start``.. into its history, if it has one."""
        slot = self._slots[number]
        known = len(slot.history)
        if known and start + len(tokens) > known:
            self._remember(slot, tokens[known - start :].tolist())

    def result(self, plan: StepPlan, hidden: Tensor) -> StepResult:
        """Logits of sampled and scored rows only, from ``hidden`` [T, hidden]."""
        slots, starts, lengths = view(plan.slots), view(plan.starts), view(plan.lengths)
        ends = np.cumsum(lengths)
        sampled = np.flatnonzero(view(plan.sample))
        prompt = [
            (int(row), *self._score(self._slots[int(slots[row])], hidden[ends[row] - lengths[row] : ends[row]], int(starts[row])))
            for row in (np.flatnonzero(view(plan.score)) if plan.score else ())
        ]
        if not len(sampled):
            return StepResult(step=plan.step, prompt=prompt)
        masks = dict(plan.masks)
        draws = [self._draw(self._slots[int(slots[row])], int(starts[row] + lengths[row]), masks.get(int(row))) for row in sampled]
        # All rows of a pure decode step are sampled, in order: nothing to pick.
        picked = hidden if len(sampled) == len(hidden) else hidden.index_select(0, torch.from_numpy(ends[sampled] - 1).to(hidden.device))
        logits = self._stage.logits(picked)
        drawn = self._sampler.draw(logits, draws)
        wanted = any(draw.params.logprobs is not None for draw in draws)
        return StepResult(
            step=plan.step,
            tokens=drawn.tokens.astype(I32).tobytes(),
            logprobs=drawn.logprobs.astype(F32).tobytes() if wanted else b"",
            top=self._alternatives(logits, draws, sampled),
            prompt=prompt,
        )

    def _draw(self, slot: _Slot, position: int, mask: bytes | None) -> Draw:
        allowed: Tensor | None = None
        if mask is not None:
            bits = np.zeros(self._sampler.rows, np.bool_)
            mine = allowed_ids(mask, self._stage.model.vocab_size)[self._sampler.start : self._sampler.start + self._sampler.rows]
            bits[: len(mine)] = mine
            allowed = torch.from_numpy(bits).to(self._stage.device)
        banned = slot.stops if position - slot.prompt_len < slot.params.min_tokens else ()
        return Draw(slot.params, position, banned, slot.seen, slot.counts, allowed)

    def _alternatives(self, logits: Tensor, draws: list[Draw], sampled: np.ndarray) -> list[tuple[int, bytes, bytes]]:
        rows = [i for i, draw in enumerate(draws) if draw.params.logprobs]
        if not rows:
            return []
        counts = [draws[i].params.logprobs or 0 for i in rows]
        chosen = logits[rows]
        ids, values = self._sampler.best(chosen, max(counts))
        values = values - self._sampler.log_normalizer(chosen).unsqueeze(1)
        return [
            (int(sampled[i]), _ints(ids[n, :count]), _floats(values[n, :count]))
            for n, (i, count) in enumerate(zip(rows, counts, strict=True))
        ]

    def _score(self, slot: _Slot, hidden: Tensor, start: int) -> tuple[bytes, bytes, bytes]:
        """Prompt log-probabilities of one chunk [L, hidden] at positions ``start``..; an entry with no known next token scores token 0."""
        logits = self._stage.logits(hidden)
        following = slot.history[start + 1 : start + 1 + len(hidden)]
        following += [0] * (len(hidden) - len(following))
        normal = self._sampler.log_normalizer(logits)
        own = self._sampler.of_tokens(logits, torch.tensor(following, device=logits.device)) - normal
        count = slot.params.prompt_logprobs or 0
        if not count:
            return _floats(own), b"", b""
        ids, values = self._sampler.best(logits, count)
        return _floats(own), _ints(ids), _floats(values - normal.unsqueeze(1))


def _ints(x: Tensor) -> bytes:
    return x.cpu().numpy().astype(I32).tobytes()


def _floats(x: Tensor) -> bytes:
    return x.cpu().numpy().astype(F32).tobytes()


class Runner:
    """One rank's part of every step.

    Args:
        stage: this rank's shard, frozen.
        pipeline: the ranks that hold the other stages of this tp rank, in stage order.
        tensor: the tp ranks of this stage.
        slots, max_seq_len: bounds of slot numbers and of a row's tokens.
        fixed_shape: compute every token in shapes that depend on its position alone.
    """

    def __init__(
        self,
        stage: LlamaStage,
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
        self._tables = np.full((slots, width), cache.dummy, dtype=np.int32)
        self._filled = np.zeros(slots, dtype=np.int32)
        self._sampling: _Sampling | None = None
        if stage.shard.last:
            sampler = Sampler(tensor, start=stage.shard.vocab.start, rows=stage.shard.vocab_rows, device=stage.device)
            self._sampling = _Sampling(stage, sampler, eos_ids)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Apply ``plan``; the last stage answers, the others return None."""
        self._apply(plan)
        hidden = self._forward(plan) if plan.slots else None
        if self._sampling is None:
            return None
        return StepResult(step=plan.step) if hidden is None else self._sampling.result(plan, hidden)

    def _apply(self, plan: StepPlan) -> None:
        slots, starts = view(plan.slots), view(plan.starts)
        for slot in view(plan.closed).tolist():
            self._tables[slot] = self._cache.dummy
            self._filled[slot] = 0
            if self._sampling is not None:
                self._sampling.close(slot)
        if self._sampling is not None:
            for opened in plan.opened:
                self._sampling.open(opened)
        if plan.block_slots:
            self._append(dict(zip(slots.tolist(), starts.tolist(), strict=True)), view(plan.block_slots), view(plan.block_ids))
        if self._sampling is not None:
            ends = np.cumsum(view(plan.lengths))
            for slot, start, tokens in zip(slots.tolist(), starts.tolist(), np.split(view(plan.tokens), ends[:-1]), strict=False):
                self._sampling.follow(slot, start, tokens)

    def _append(self, starts: dict[int, int], slots: Ints, blocks: Ints) -> None:
        """Append ``blocks`` to the tables of ``slots`` and clear those that hold nothing computed yet (a prefix hit's do)."""
        fresh: list[int] = []
        for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True):
            place = self._filled[slot]
            self._tables[slot, place] = block
            self._filled[slot] = place + 1
            if place * self._cache.block_size >= starts.get(slot, 0):
                fresh.append(block)
        if fresh:
            self._cache.clear(torch.tensor(fresh, device=self.stage.device))

    def _forward(self, plan: StepPlan) -> Tensor:
        stage, slots = self.stage, view(plan.slots)
        starts, lengths, tokens = view(plan.starts), view(plan.lengths), view(plan.tokens)
        layout = attention_layout(starts, lengths, self._tables[slots], self._cache.block_size, grouped=not self._fixed_shape)
        if stage.shard.first:
            hidden = stage.embed(torch.from_numpy(tokens.astype(np.int64)).to(stage.device))
        else:
            hidden = torch.empty(len(tokens), stage.model.hidden_size, dtype=stage.dtype, device=stage.device)
            self._pipeline.recv(hidden, self._pipeline.rank - 1)
        hidden = stage.forward(hidden, layout, self._cache.layers)
        if not stage.shard.last:
            self._pipeline.send(hidden, self._pipeline.rank + 1)
        return hidden
