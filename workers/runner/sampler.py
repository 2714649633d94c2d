"""The torch sampler over a sharded vocabulary: same definition, same order, as the numpy one in :mod:`workers.sampling.definition`.

Owns nothing between steps. Each tp rank scores its own part of the vocabulary; ranks exchange a few numbers for each sequence: the best
(score, id), the parts of a log-sum-exp, and each shard's largest values if top-k, top-p or logprobs need them. All ranks must make the same
choice: every decision depends only on gathered numbers.

Shapes: S sequences that sample in this step; ``rows``: vocabulary rows of this rank's shard, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.protocol.messages import SamplingParams
from workers.sampling.definition import MIX_A, MIX_B, noise_keys

#: Number of largest values that each shard sends for top-k and top-p; if they are not enough, all logits of a sequence are gathered.
SHOWN = 64
_HALF_WORD = 0xFFFF


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """The sampling inputs of one sequence for one token. ``position``: the absolute position that the token takes. ``banned``: ids that are
    forbidden now (``min_tokens``).

    ``seen`` [rows] bool, ``counts`` [rows] float: whether the history holds an id, and how often the output does, for this shard's ids;
    only with penalties. ``mask`` [rows] bool: this shard's part of a guide's mask, True = allowed.
    """

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    seen: Tensor | None = None
    counts: Tensor | None = None
    mask: Tensor | None = None

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is the one with the largest raw logit and no log-probability is requested."""
        p = self.params
        adjusted = p.logit_bias or self.banned or self.seen is not None or self.mask is not None
        return p.temperature == 0.0 and p.logprobs is None and not adjusted


@dataclass(frozen=True, slots=True)
class SamplingOutput:
    """``tokens`` [N] int32 (-1 = no finite logit to choose from), ``logprobs`` [N] float32 of the raw distribution."""

    tokens: np.ndarray
    logprobs: np.ndarray


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def _mix(x: Tensor) -> Tensor:
    """The 32-bit mixer of the definition, in place on int32: products wrap around, and masks turn arithmetic shifts into logical ones."""
    x ^= (x >> 16) & _HALF_WORD
    x *= _signed(MIX_A)
    x ^= (x >> 15) & (_HALF_WORD << 1 | 1)
    x *= _signed(MIX_B)
    x ^= (x >> 16) & _HALF_WORD
    return x


def noise(inputs: list[SamplingInput], ids: Tensor) -> Tensor:
    """Gumbel noise [n, N] fp32 of candidates ``ids`` [N] int32 for each of ``inputs``.

    Its integers are bitwise equal to those of :func:`workers.sampling.definition.noise_bits`.
    """
    keys = [noise_keys(one.params.seed, one.position) for one in inputs]
    k = torch.tensor([[_signed(key)] for key, _ in keys], dtype=torch.int32, device=ids.device)
    j = torch.tensor([[_signed(key)] for _, key in keys], dtype=torch.int32, device=ids.device)
    bits = _mix(_mix(ids.unsqueeze(0) + k).bitwise_xor_(j))
    w = (bits.to(torch.int64) & 0xFFFFFFFF).float().mul_(2.0**-32).add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


class Sampler:
    """Chooses tokens from this rank's logits. All ranks of ``group`` call it together and get the same tokens.

    ``start``: first vocabulary id of this shard; ``rows``: its stored rows (the logits of padding rows are -inf).
    """

    def __init__(self, group: Group, *, start: int, rows: int, device: torch.device) -> None:
        self._group, self.start, self.rows = group, start, rows
        self._ids = torch.arange(start, start + rows, dtype=torch.int32, device=device)

    def local_ids(self, tokens: np.ndarray) -> np.ndarray:
        """The ``tokens`` that belong to this shard, relative to its first id."""
        inside = (tokens >= self.start) & (tokens < self.start + self.rows)
        return tokens[inside] - self.start

    def sample(self, logits: Tensor, inputs: list[SamplingInput]) -> SamplingOutput:
        """Choose one token for each of ``inputs`` [N] from ``logits`` [N, rows] fp32, which stay unchanged."""
        if all(one.plain_greedy for one in inputs):
            values, ids = logits.max(-1)
            tokens, _ = self._global_argmax(values, ids, torch.zeros_like(values), values)
            return SamplingOutput(tokens, np.zeros(len(inputs), np.float32))
        scores = self._adjusted(logits, inputs)
        random = [index for index, one in enumerate(inputs) if one.params.temperature > 0.0]
        if random:
            scaled = scores[random]
            temperatures = torch.tensor([[inputs[i].params.temperature] for i in random], dtype=torch.float32, device=logits.device)
            scaled /= temperatures
            random_inputs = [inputs[i] for i in random]
            if any(one.params.top_k or one.params.top_p < 1.0 or one.params.min_p > 0.0 for one in random_inputs):
                thresholds = self._thresholds(scaled, [one.params for one in random_inputs])
                scaled.masked_fill_(scaled < thresholds, -torch.inf)
            scores[random] = scaled + noise(random_inputs, self._ids)
        values, ids = scores.max(-1)
        raw = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
        tokens, chosen_raw = self._global_argmax(values, ids, raw, logits.max(-1).values)
        if not any(one.params.logprobs is not None for one in inputs):
            return SamplingOutput(tokens, np.zeros(len(inputs), np.float32))
        return SamplingOutput(tokens, (chosen_raw - self.log_normalizer(logits)).float().cpu().numpy())

    def _global_argmax(self, values: Tensor, ids: Tensor, raw: Tensor, highest: Tensor) -> tuple[np.ndarray, Tensor]:
        """(tokens [N], raw logit of each [N] fp64) from each shard's best scores ``values`` [N], their local ``ids`` and ``raw`` logits.

        ``highest`` [N]: the shard's largest raw logit, NaN or +inf where the logits are unusable.
        """
        mine = torch.stack((values.double(), (ids + self.start).double(), raw.double(), highest.double()))
        every = self._group.all_gather(mine)
        scores = every[:, 0]
        # The first of equal maxima is the shard with the lower ids.
        best = scores.argmax(0, keepdim=True)
        top = scores.gather(0, best).squeeze(0)
        tokens = every[:, 1].gather(0, best).squeeze(0)
        usable = (every[:, 3] < torch.inf).all(0) & (top > -torch.inf)
        return tokens.where(usable, -1.0).to(torch.int32).cpu().numpy(), every[:, 2].gather(0, best).squeeze(0)

    def _adjusted(self, logits: Tensor, inputs: list[SamplingInput]) -> Tensor:
        """A copy of ``logits`` after bias, penalties, banned ids and masks."""
        scores = logits.clone()
        for row, one in zip(scores, inputs, strict=True):
            params = one.params
            for token, bias in (params.logit_bias or {}).items():
                if self.start <= token < self.start + self.rows:
                    row[token - self.start] += bias
            if one.seen is not None and one.counts is not None:
                if params.repetition_penalty != 1.0:
                    rate = params.repetition_penalty
                    row.copy_(torch.where(one.seen, torch.where(row > 0, row / rate, row * rate), row))
                row -= one.counts * params.frequency_penalty + (one.counts > 0).float() * params.presence_penalty
            for token in one.banned:
                if self.start <= token < self.start + self.rows:
                    row[token - self.start] = -torch.inf
            if one.mask is not None:
                row.masked_fill_(~one.mask, -torch.inf)
        return scores

    def _thresholds(self, scores: Tensor, params: list[SamplingParams]) -> Tensor:
        """[n, 1] lowest score that top-k, top-p and min-p of each of ``params`` [n] keep of ``scores`` [n, rows].

        If the values that the shards send are not enough, all scores of a sequence are gathered.
        """
        top_k = torch.tensor([min(p.top_k, 2**31 - 1) for p in params], device=scores.device)
        shown = min(self.rows, max(SHOWN, int(top_k.max()) + 1))
        largest = scores.topk(shown, -1).values
        total = (
            (scores.double() - (peak := scores.max(-1, keepdim=True).values.double().nan_to_num(neginf=0.0))).exp().sum(-1, keepdim=True)
        )
        every = self._group.all_gather(torch.cat((largest.double(), peak, total), 1))
        shards = every[:, :, :shown]
        values = shards.transpose(0, 1).reshape(len(params), -1).sort(-1, descending=True).values
        highest = values[:, :1]
        mass = (every[:, :, shown + 1] * (every[:, :, shown] - highest.T).exp()).sum(0).unsqueeze(1)
        floor = shards[:, :, -1].max(0).values.unsqueeze(1) if shown < self.rows else torch.full_like(highest, -torch.inf)
        thresholds, covered = _thresholds_of(values, mass, floor, params)
        uncovered = torch.nonzero(~covered).squeeze(1)
        if len(uncovered):
            whole = self._group.all_gather(scores[uncovered].contiguous()).double().transpose(0, 1).reshape(len(uncovered), -1)
            values = whole.sort(-1, descending=True).values
            mass = (values - values[:, :1]).exp().sum(-1, keepdim=True)
            wanted = [params[index] for index in uncovered.tolist()]
            thresholds[uncovered], _ = _thresholds_of(values, mass, torch.full_like(mass, -torch.inf), wanted)
        return thresholds.float()

    def log_normalizer(self, logits: Tensor) -> Tensor:
        """[N] fp64 log-sum-exp over the whole vocabulary; ``logits`` [N, rows]."""
        peak = logits.max(-1).values.double()
        finite = peak.nan_to_num(neginf=0.0)
        total = (logits.double() - finite.unsqueeze(1)).exp_().sum(-1)
        every = self._group.all_gather(torch.stack((finite, total)))
        highest = every[:, 0].max(0).values
        return highest + (every[:, 1] * (every[:, 0] - highest).exp()).sum(0).log()

    def top_logits(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(ids, values fp64), each [N, count]: the largest logits of the whole vocabulary in falling order, ties by id."""
        shown = min(count, self.rows)
        # Value and id in one integer, so that equal values have an order: fp32 as an ordered int32 above, the reversed id below.
        ordered = (logits + 0.0).view(torch.int32)
        ordered = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        keys = (ordered.long() << 32) | (0x7FFFFFFF - self._ids.long())
        mine = keys.topk(shown, -1).values.contiguous()
        every = self._group.all_gather(mine).transpose(0, 1).reshape(len(logits), -1)
        merged = every.topk(min(count, every.shape[1]), -1).values
        high = (merged >> 32).to(torch.int32)
        values = (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
        return 0x7FFFFFFF - (merged & 0x7FFFFFFF), values.double()

    def logits_of(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[N] fp64 raw logits of ``tokens`` [N], ids of the whole vocabulary."""
        local = tokens - self.start
        mine = (local >= 0) & (local < self.rows)
        found = logits.gather(1, local.clamp(0, self.rows - 1).unsqueeze(1)).squeeze(1).double()
        return self._group.all_reduce(found.where(mine, 0.0))


def _thresholds_of(values: Tensor, mass: Tensor, floor: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """(thresholds [n, 1], covered [n] bool) from ``values`` [n, m]: scores in falling order, complete above ``floor`` [n, 1].

    ``mass`` [n, 1]: sum of exp(score - best) over the whole vocabulary. If ``covered`` is False, the values do not reach the threshold.
    Ties with the last score kept are kept, as :func:`workers.sampling.definition.choose` defines.
    """
    thresholds = torch.full_like(mass, -torch.inf)
    covered = torch.ones(len(params), dtype=torch.bool)
    weights = (values - values[:, :1]).exp()
    for index, p in enumerate(params):
        threshold, known = -torch.inf, float(floor[index])
        ordered, total = values[index], float(mass[index])
        kept = weights[index]
        if 0 < p.top_k < ordered.numel():
            threshold = float(ordered[p.top_k - 1])
            covered[index] &= threshold > known
            kept = kept[ordered >= threshold]
            total = float(kept.sum())
        if p.top_p < 1.0:
            cumulated = kept.cumsum(0)
            # The entries strictly better than entry i are all before the first entry equal to it.
            first = torch.searchsorted(-ordered[: len(kept)].contiguous(), -ordered[: len(kept)].contiguous())
            above = torch.where(first > 0, cumulated[(first - 1).clamp_min(0)], 0.0)
            last = int((above < p.top_p * total).sum()) - 1
            threshold = max(threshold, float(ordered[last]))
            covered[index] &= threshold > known
        if p.min_p > 0.0:
            threshold = max(threshold, float(np.float32(float(ordered[0])) + np.float32(np.log(p.min_p))))
        thresholds[index] = threshold
    return thresholds, covered
