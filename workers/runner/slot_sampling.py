"""The last stage's sampling state of each sequence, and the way from a step's hidden states to tokens and prompt logprobs.

Owns the sampling state by slot. Must never store facts of a plan: position, mask and whether a sequence samples come with each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.models.stage import Stage
from workers.protocol.messages import SamplingParams
from workers.runner.sampler import Sampler, SamplingInput
from workers.sampling.definition import allowed_ids, has_mask, has_penalties, stop_set
from workers.scheduler.step_plan import F32, I32, Ints, OpenSlot, StepPlan, StepResult, view

#: Tokens whose logits are in memory at a time for prompt logprobs: 128 MB for a vocabulary of 128k.
_SCORED_TOKENS = 256

Indices = npt.NDArray[np.int64]


def is_plain(params: SamplingParams) -> bool:
    """Whether tokens depend only on the seed, the temperature and the raw logits, and no log-probability is requested."""
    adjusted = params.logit_bias or has_penalties(params) or params.min_tokens or has_mask(params)
    cut = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
    return not (adjusted or cut) and params.logprobs is None and params.prompt_logprobs is None


@dataclass(slots=True)
class _SamplingSlot:
    """Sampling state of one sequence. ``history``: prompt and output ids, kept only if sampling needs them. ``seen`` [rows] bool and
    ``counts`` [rows] float, over this rank's vocabulary rows: whether the history holds an id, and how often the output does."""

    params: SamplingParams
    prompt_len: int
    stops: tuple[int, ...]
    history: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """``tokens`` [n] int32; ``logprobs`` [n] (None = not requested); ``top`` as in a StepResult."""

    tokens: Ints
    logprobs: npt.NDArray[np.float32] | None
    top: list[tuple[int, bytes, bytes]]


class SlotSampling:
    """Turns hidden states of the last stage into tokens and prompt logprobs, for the slots that were opened here."""

    def __init__(self, stage: Stage, sampler: Sampler, eos_ids: tuple[int, ...]) -> None:
        self._stage, self._sampler, self._eos_ids = stage, sampler, eos_ids
        self._slots: dict[int, _SamplingSlot] = {}

    def open(self, opened: OpenSlot) -> None:
        """Begin the sampling state of a slot."""
        slot = _SamplingSlot(opened.params, opened.prompt_len, tuple(sorted(stop_set(opened.params, self._eos_ids))))
        if has_penalties(opened.params):
            slot.seen = torch.zeros(self._sampler.rows, dtype=torch.bool, device=self._stage.device)
            slot.counts = torch.zeros(self._sampler.rows, dtype=torch.float32, device=self._stage.device)
        self._slots[opened.slot] = slot
        self._extend_history(slot, view(opened.history).tolist())

    def close(self, slot: int) -> None:
        """Drop the sampling state of ``slot``, if it has one."""
        self._slots.pop(slot, None)

    def _extend_history(self, slot: _SamplingSlot, tokens: list[int]) -> None:
        first = len(slot.history)
        slot.history += tokens
        if slot.seen is None or slot.counts is None:
            return
        ids, device = np.asarray(tokens, np.int64), slot.counts.device
        slot.seen[torch.from_numpy(self._sampler.local_ids(ids)).to(device)] = True
        output = torch.from_numpy(self._sampler.local_ids(ids[max(slot.prompt_len - first, 0) :])).to(device)
        slot.counts.index_add_(0, output, torch.ones(len(output), device=device))

    def append_tokens(self, plan: StepPlan) -> None:
        """Append the query tokens of ``plan`` to the history of every sequence that keeps one."""
        slots, starts, lengths, tokens = view(plan.slots), view(plan.starts), view(plan.lengths), view(plan.tokens)
        ends = np.cumsum(lengths)
        for number, start, query in zip(slots.tolist(), starts.tolist(), np.split(tokens, ends[:-1]), strict=False):
            slot = self._slots.get(number)
            known = len(slot.history) if slot is not None else 0
            if slot is not None and known and start + len(query) > known:
                self._extend_history(slot, query[known - start :].tolist())

    def result(self, plan: StepPlan, hidden: Tensor) -> StepResult:
        """The whole result of ``plan``; ``hidden`` [T, hidden_size] of all its tokens."""
        prompt_logprobs = self.prompt_logprobs(plan, hidden)
        sampled_indices = np.flatnonzero(view(plan.sample))
        if not len(sampled_indices):
            return StepResult(step=plan.step, prompt_logprobs=prompt_logprobs)
        ends = np.cumsum(view(plan.lengths))
        # In a pure decode step every token is sampled, in order: nothing has to be selected.
        picked = hidden
        if len(sampled_indices) < len(hidden):
            picked = hidden.index_select(0, torch.from_numpy(ends[sampled_indices] - 1).to(hidden.device))
        found = self.sample(plan, sampled_indices, picked)
        logprobs = b"" if found.logprobs is None else found.logprobs.astype(F32).tobytes()
        tokens = found.tokens.astype(I32).tobytes()
        return StepResult(step=plan.step, tokens=tokens, logprobs=logprobs, top=found.top, prompt_logprobs=prompt_logprobs)

    def sample(self, plan: StepPlan, sequences: Indices, hidden: Tensor) -> SampledTokens:
        """Sample tokens of ``sequences`` [n], indices in ``plan``, whose slots are open here; ``hidden`` [n, hidden_size] of their last
        tokens."""
        slots, positions = view(plan.slots)[sequences], (view(plan.starts) + view(plan.lengths))[sequences]
        masks = dict(plan.masks)
        inputs = [
            self._input(self._slots[slot], position, masks.get(index))
            for slot, position, index in zip(slots.tolist(), positions.tolist(), sequences.tolist(), strict=True)
        ]
        logits = self._stage.logits(hidden)
        output = self._sampler.sample(logits, inputs)
        wanted = any(one.params.logprobs is not None for one in inputs)
        return SampledTokens(output.tokens, output.logprobs if wanted else None, self._top(logits, inputs, sequences))

    def prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> list[tuple[int, bytes, bytes, bytes]]:
        """Prompt logprobs that ``plan`` requests, as in a StepResult, from ``hidden`` [T, hidden_size] of all its tokens."""
        if not plan.score:
            return []
        slots, starts, lengths = view(plan.slots), view(plan.starts), view(plan.lengths)
        ends = np.cumsum(lengths)
        return [
            (int(i), *self._score(self._slots[int(slots[i])], hidden[ends[i] - lengths[i] : ends[i]], int(starts[i])))
            for i in np.flatnonzero(view(plan.score))
        ]

    def _input(self, slot: _SamplingSlot, position: int, mask: bytes | None) -> SamplingInput:
        allowed: Tensor | None = None
        if mask is not None:
            bits = np.zeros(self._sampler.rows, np.bool_)
            mine = allowed_ids(mask, self._stage.model.vocab_size)[self._sampler.start : self._sampler.start + self._sampler.rows]
            bits[: len(mine)] = mine
            allowed = torch.from_numpy(bits).to(self._stage.device)
        banned = slot.stops if position - slot.prompt_len < slot.params.min_tokens else ()
        return SamplingInput(slot.params, position, banned, slot.seen, slot.counts, allowed)

    def _top(self, logits: Tensor, inputs: list[SamplingInput], sequences: Indices) -> list[tuple[int, bytes, bytes]]:
        """The alternatives that ``inputs`` [n] request, as in a StepResult."""
        asking = [i for i, one in enumerate(inputs) if one.params.logprobs]
        if not asking:
            return []
        counts = [inputs[i].params.logprobs or 0 for i in asking]
        asked = logits[asking]
        ids, values = self._sampler.top_logits(asked, max(counts))
        values = values - self._sampler.log_normalizer(asked).unsqueeze(1)
        return [
            (int(sequences[i]), _ints(ids[n, :count]), _floats(values[n, :count]))
            for n, (i, count) in enumerate(zip(asking, counts, strict=True))
        ]

    def _score(self, slot: _SamplingSlot, hidden: Tensor, start: int) -> tuple[bytes, bytes, bytes]:
        """Prompt logprobs of one chunk [L, hidden_size] at positions ``start``.., ``_SCORED_TOKENS`` at a time: (own, top ids, top
        values)."""
        parts = [self._score_part(slot, part, start + i * _SCORED_TOKENS) for i, part in enumerate(torch.split(hidden, _SCORED_TOKENS))]
        own, ids, values = zip(*parts, strict=True)
        return b"".join(own), b"".join(ids), b"".join(values)

    def _score_part(self, slot: _SamplingSlot, hidden: Tensor, start: int) -> tuple[bytes, bytes, bytes]:
        """:meth:`_score` for one part. An entry whose next token is not known scores token 0."""
        logits = self._stage.logits(hidden)
        following = slot.history[start + 1 : start + 1 + len(hidden)]
        following += [0] * (len(hidden) - len(following))
        normal = self._sampler.log_normalizer(logits)
        own = self._sampler.logits_of(logits, torch.tensor(following, device=logits.device)) - normal
        count = slot.params.prompt_logprobs or 0
        if not count:
            return _floats(own), b"", b""
        ids, values = self._sampler.top_logits(logits, count)
        return _floats(own), _ints(ids), _floats(values - normal.unsqueeze(1))


def _ints(x: Tensor) -> bytes:
    return x.cpu().numpy().astype(I32).tobytes()


def _floats(x: Tensor) -> bytes:
    return x.cpu().numpy().astype(F32).tobytes()
