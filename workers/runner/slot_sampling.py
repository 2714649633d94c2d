"""What the last stage remembers of each row to choose its tokens, and how a step's logits become choices and scores.

Owns the sampling state by slot. Must never keep what only a plan knows: position, mask and whether a row is sampled come with each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.models.decoder import DecoderStage
from workers.protocol.messages import SamplingParams
from workers.runner.sampler import Draw, Sampler
from workers.sampling.definition import allowed_ids, has_penalties, stop_set
from workers.scheduler.step_plan import F32, I32, Ints, OpenSlot, StepPlan, StepResult, view

#: Rows of logits that prompt scores hold at a time: 128 MB for a vocabulary of 128k.
_SCORED_ROWS = 256

Rows = npt.NDArray[np.int64]


def is_plain(params: SamplingParams) -> bool:
    """Whether a row's tokens follow from its seed, its temperature and the raw logits alone, and nobody wants to know more."""
    adjusted = params.logit_bias or has_penalties(params) or params.min_tokens or params.guide is not None
    cut = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
    return not (adjusted or cut) and params.logprobs is None and params.prompt_logprobs is None


@dataclass(slots=True)
class _SamplingSlot:
    """Sampling state of one row. ``history``: prompt and output ids, kept only where sampling needs them; ``seen`` [rows] bool and
    ``counts`` [rows] float are its view on this rank's vocabulary rows."""

    params: SamplingParams
    prompt_len: int
    stops: tuple[int, ...]
    history: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """``tokens`` [n] int32; ``logprobs`` [n], None where nobody asked; ``top`` as in a StepResult."""

    tokens: Ints
    logprobs: npt.NDArray[np.float32] | None
    top: list[tuple[int, bytes, bytes]]


class SlotSampling:
    """Turns what the last stage computed into tokens and scores, for the slots that were opened here."""

    def __init__(self, stage: DecoderStage, sampler: Sampler, eos_ids: tuple[int, ...]) -> None:
        self._stage, self._sampler, self._eos_ids = stage, sampler, eos_ids
        self._slots: dict[int, _SamplingSlot] = {}

    def open(self, opened: OpenSlot) -> None:
        slot = _SamplingSlot(opened.params, opened.prompt_len, tuple(sorted(stop_set(opened.params, self._eos_ids))))
        if has_penalties(opened.params):
            slot.seen = torch.zeros(self._sampler.rows, dtype=torch.bool, device=self._stage.device)
            slot.counts = torch.zeros(self._sampler.rows, dtype=torch.float32, device=self._stage.device)
        self._slots[opened.slot] = slot
        self._remember(slot, view(opened.history).tolist())

    def close(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _remember(self, slot: _SamplingSlot, tokens: list[int]) -> None:
        first = len(slot.history)
        slot.history += tokens
        if slot.seen is None or slot.counts is None:
            return
        ids, device = np.asarray(tokens, np.int64), slot.counts.device
        slot.seen[torch.from_numpy(self._sampler.local(ids)).to(device)] = True
        output = torch.from_numpy(self._sampler.local(ids[max(slot.prompt_len - first, 0) :])).to(device)
        slot.counts.index_add_(0, output, torch.ones(len(output), device=device))

    def follow(self, plan: StepPlan) -> None:
        """Take the query tokens of every row into its history, where it has one."""
        slots, starts, lengths, tokens = view(plan.slots), view(plan.starts), view(plan.lengths), view(plan.tokens)
        ends = np.cumsum(lengths)
        for number, start, query in zip(slots.tolist(), starts.tolist(), np.split(tokens, ends[:-1]), strict=False):
            slot = self._slots.get(number)
            known = len(slot.history) if slot is not None else 0
            if slot is not None and known and start + len(query) > known:
                self._remember(slot, query[known - start :].tolist())

    def result(self, plan: StepPlan, hidden: Tensor) -> StepResult:
        """The whole answer to ``plan``; ``hidden`` [T, hidden] of all its tokens."""
        prompt = self.scores(plan, hidden)
        rows = np.flatnonzero(view(plan.sample))
        if not len(rows):
            return StepResult(step=plan.step, prompt=prompt)
        ends = np.cumsum(view(plan.lengths))
        # All rows of a pure decode step are sampled, in order: nothing to pick.
        picked = hidden if len(rows) == len(hidden) else hidden.index_select(0, torch.from_numpy(ends[rows] - 1).to(hidden.device))
        choice = self.choose(plan, rows, picked)
        logprobs = b"" if choice.logprobs is None else choice.logprobs.astype(F32).tobytes()
        return StepResult(step=plan.step, tokens=choice.tokens.astype(I32).tobytes(), logprobs=logprobs, top=choice.top, prompt=prompt)

    def choose(self, plan: StepPlan, rows: Rows, hidden: Tensor) -> SampledTokens:
        """Tokens of the plan's ``rows`` [n], each of which samples and is open here; ``hidden`` [n, hidden] of their last tokens."""
        slots, positions = view(plan.slots)[rows], (view(plan.starts) + view(plan.lengths))[rows]
        masks = dict(plan.masks)
        draws = [
            self._draw(self._slots[slot], position, masks.get(row))
            for slot, position, row in zip(slots.tolist(), positions.tolist(), rows.tolist(), strict=True)
        ]
        logits = self._stage.logits(hidden)
        drawn = self._sampler.draw(logits, draws)
        wanted = any(draw.params.logprobs is not None for draw in draws)
        return SampledTokens(drawn.tokens, drawn.logprobs if wanted else None, self._alternatives(logits, draws, rows))

    def scores(self, plan: StepPlan, hidden: Tensor) -> list[tuple[int, bytes, bytes, bytes]]:
        """Prompt log-probabilities that ``plan`` asks for, from ``hidden`` [T, hidden] of all its tokens."""
        if not plan.score:
            return []
        slots, starts, lengths = view(plan.slots), view(plan.starts), view(plan.lengths)
        ends = np.cumsum(lengths)
        return [
            (int(row), *self._score(self._slots[int(slots[row])], hidden[ends[row] - lengths[row] : ends[row]], int(starts[row])))
            for row in np.flatnonzero(view(plan.score))
        ]

    def _draw(self, slot: _SamplingSlot, position: int, mask: bytes | None) -> Draw:
        allowed: Tensor | None = None
        if mask is not None:
            bits = np.zeros(self._sampler.rows, np.bool_)
            mine = allowed_ids(mask, self._stage.model.vocab_size)[self._sampler.start : self._sampler.start + self._sampler.rows]
            bits[: len(mine)] = mine
            allowed = torch.from_numpy(bits).to(self._stage.device)
        banned = slot.stops if position - slot.prompt_len < slot.params.min_tokens else ()
        return Draw(slot.params, position, banned, slot.seen, slot.counts, allowed)

    def _alternatives(self, logits: Tensor, draws: list[Draw], rows: Rows) -> list[tuple[int, bytes, bytes]]:
        asking = [i for i, draw in enumerate(draws) if draw.params.logprobs]
        if not asking:
            return []
        counts = [draws[i].params.logprobs or 0 for i in asking]
        chosen = logits[asking]
        ids, values = self._sampler.best(chosen, max(counts))
        values = values - self._sampler.log_normalizer(chosen).unsqueeze(1)
        return [
            (int(rows[i]), _ints(ids[n, :count]), _floats(values[n, :count]))
            for n, (i, count) in enumerate(zip(asking, counts, strict=True))
        ]

    def _score(self, slot: _SamplingSlot, hidden: Tensor, start: int) -> tuple[bytes, bytes, bytes]:
        """Prompt log-probabilities of one chunk [L, hidden] at positions ``start``.., some rows at a time."""
        parts = [self._score_part(slot, part, start + i * _SCORED_ROWS) for i, part in enumerate(torch.split(hidden, _SCORED_ROWS))]
        own, ids, values = zip(*parts, strict=True)
        return b"".join(own), b"".join(ids), b"".join(values)

    def _score_part(self, slot: _SamplingSlot, hidden: Tensor, start: int) -> tuple[bytes, bytes, bytes]:
        """An entry with no known next token scores token 0."""
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
