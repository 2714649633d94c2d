"""The torch sampler over a sharded vocabulary: same definition, same order, as the numpy one in :mod:`workers.sampling.definition`.

Owns nothing between steps. Each tp rank scores its own rows of the vocabulary; what ranks exchange is a few numbers a row: the best
(score, id), the pieces of a log-sum-exp, and each shard's largest values where top-k, top-p or logprobs need them. Must never make a choice
that another rank could make differently: every decision follows from gathered numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.protocol.messages import SamplingParams
from workers.sampling.definition import MIX_A, MIX_B, noise_keys

#: Largest values that each shard shows for top-k and top-p before whole rows must be gathered.
SHOWN = 64
_HALF_WORD = 0xFFFF


@dataclass(frozen=True, slots=True)
class Draw:
    """One row that wants a token. ``position`` = the absolute position that it takes. ``banned``: ids forbidden now (min_tokens).

    ``seen`` [rows] bool, ``counts`` [rows] float: this shard's view of history and output, for rows with penalties. ``mask`` [rows] bool:
    this shard's part of a guide's mask.
    """

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    seen: Tensor | None = None
    counts: Tensor | None = None
    mask: Tensor | None = None

    @property
    def plain_greedy(self) -> bool:
        p = self.params
        adjusted = p.logit_bias or self.banned or self.seen is not None or self.mask is not None
        return p.temperature == 0.0 and p.logprobs is None and not adjusted


@dataclass(frozen=True, slots=True)
class Drawn:
    """``tokens`` [S] int32 (-1 = nothing finite to choose from), ``logprobs`` [S] float32 of the raw distribution."""

    tokens: np.ndarray
    logprobs: np.ndarray


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def _mix(x: Tensor) -> Tensor:
    """The 32-bit mixer in place on int32: products wrap, and masks turn arithmetic shifts into logical ones."""
    x ^= (x >> 16) & _HALF_WORD
    x *= _signed(MIX_A)
    x ^= (x >> 15) & (_HALF_WORD << 1 | 1)
    x *= _signed(MIX_B)
    x ^= (x >> 16) & _HALF_WORD
    return x


def noise(draws: list[Draw], ids: Tensor) -> Tensor:
    """Gumbel noise [n, N] fp32 of candidates ``ids`` [N] int32 for each of ``draws``, bit for bit the integers of ``params.noise_bits``."""
    keys = [noise_keys(draw.params.seed, draw.position) for draw in draws]
    k = torch.tensor([[_signed(key)] for key, _ in keys], dtype=torch.int32, device=ids.device)
    j = torch.tensor([[_signed(key)] for _, key in keys], dtype=torch.int32, device=ids.device)
    bits = _mix(_mix(ids.unsqueeze(0) + k).bitwise_xor_(j))
    w = (bits.to(torch.int64) & 0xFFFFFFFF).float().mul_(2.0**-32).add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


class Sampler:
    """Chooses tokens from this rank's logits; all ranks of ``group`` call it together and get the same answer.

    ``start``: first vocabulary id of this shard; ``rows``: its stored rows (padding included, whose logits are -inf).
    """

    def __init__(self, group: Group, *, start: int, rows: int, device: torch.device) -> None:
        self._group, self.start, self.rows = group, start, rows
        self._ids = torch.arange(start, start + rows, dtype=torch.int32, device=device)

    def local(self, tokens: np.ndarray) -> np.ndarray:
        """The ids among ``tokens`` that live here, counted from this shard's first."""
        inside = (tokens >= self.start) & (tokens < self.start + self.rows)
        return tokens[inside] - self.start

    def draw(self, logits: Tensor, draws: list[Draw]) -> Drawn:
        """One token a row of ``logits`` [S, rows] fp32 (raw, kept unchanged)."""
        if all(draw.plain_greedy for draw in draws):
            values, ids = logits.max(-1)
            tokens, _ = self._winners(values, ids, torch.zeros_like(values), values)
            return Drawn(tokens, np.zeros(len(draws), np.float32))
        scores = self._adjusted(logits, draws)
        warm = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
        if warm:
            chosen = scores[warm]
            rates = torch.tensor([[draws[row].params.temperature] for row in warm], dtype=torch.float32, device=logits.device)
            chosen /= rates
            heated = [draws[row] for row in warm]
            if any(d.params.top_k or d.params.top_p < 1.0 or d.params.min_p > 0.0 for d in heated):
                edges = self._edges(chosen, [d.params for d in heated])
                chosen.masked_fill_(chosen < edges, -torch.inf)
            scores[warm] = chosen + noise(heated, self._ids)
        values, ids = scores.max(-1)
        raw = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
        tokens, winner = self._winners(values, ids, raw, logits.max(-1).values)
        if not any(draw.params.logprobs is not None for draw in draws):
            return Drawn(tokens, np.zeros(len(draws), np.float32))
        return Drawn(tokens, (winner - self.log_normalizer(logits)).float().cpu().numpy())

    def _winners(self, values: Tensor, ids: Tensor, raw: Tensor, highest: Tensor) -> tuple[np.ndarray, Tensor]:
        """(tokens [S], raw logit of each [S] fp64). ``highest``: each row's largest raw logit, NaN or +inf where the row is unusable."""
        mine = torch.stack((values.double(), (ids + self.start).double(), raw.double(), highest.double()))
        every = self._group.all_gather(mine)
        scores = every[:, 0]
        # The first of equal maxima is the shard with the lower ids.
        best = scores.argmax(0, keepdim=True)
        top = scores.gather(0, best).squeeze(0)
        tokens = every[:, 1].gather(0, best).squeeze(0)
        usable = (every[:, 3] < torch.inf).all(0) & (top > -torch.inf)
        return tokens.where(usable, -1.0).to(torch.int32).cpu().numpy(), every[:, 2].gather(0, best).squeeze(0)

    def _adjusted(self, logits: Tensor, draws: list[Draw]) -> Tensor:
        """A copy of ``logits`` after bias, penalties, banned ids and masks."""
        scores = logits.clone()
        for row, draw in zip(scores, draws, strict=True):
            params = draw.params
            for token, bias in (params.logit_bias or {}).items():
                if self.start <= token < self.start + self.rows:
                    row[token - self.start] += bias
            if draw.seen is not None and draw.counts is not None:
                if params.repetition_penalty != 1.0:
                    rate = params.repetition_penalty
                    row.copy_(torch.where(draw.seen, torch.where(row > 0, row / rate, row * rate), row))
                row -= draw.counts * params.frequency_penalty + (draw.counts > 0).float() * params.presence_penalty
            for token in draw.banned:
                if self.start <= token < self.start + self.rows:
                    row[token - self.start] = -torch.inf
            if draw.mask is not None:
                row.masked_fill_(~draw.mask, -torch.inf)
        return scores

    def _edges(self, scores: Tensor, params: list[SamplingParams]) -> Tensor:
        """[n, 1] lowest score that each row's top-k, top-p and min-p keep; whole rows are gathered where the shown values fall short."""
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
        edges, covered = _edges_of(values, mass, floor, params)
        open_rows = torch.nonzero(~covered).squeeze(1)
        if len(open_rows):
            rows = self._group.all_gather(scores[open_rows].contiguous()).double().transpose(0, 1).reshape(len(open_rows), -1)
            values = rows.sort(-1, descending=True).values
            mass = (values - values[:, :1]).exp().sum(-1, keepdim=True)
            wanted = [params[row] for row in open_rows.tolist()]
            edges[open_rows], _ = _edges_of(values, mass, torch.full_like(mass, -torch.inf), wanted)
        return edges.float()

    def log_normalizer(self, logits: Tensor) -> Tensor:
        """[S] fp64 log-sum-exp of whole rows of ``logits`` [S, rows]."""
        peak = logits.max(-1).values.double()
        finite = peak.nan_to_num(neginf=0.0)
        total = (logits.double() - finite.unsqueeze(1)).exp_().sum(-1)
        every = self._group.all_gather(torch.stack((finite, total)))
        highest = every[:, 0].max(0).values
        return highest + (every[:, 1] * (every[:, 0] - highest).exp()).sum(0).log()

    def best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(ids, values fp64), each [S, count], the largest of whole rows in falling order, ties by id."""
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

    def of_tokens(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[S] fp64 raw logits of whole-vocabulary ids ``tokens`` [S]."""
        local = tokens - self.start
        mine = (local >= 0) & (local < self.rows)
        found = logits.gather(1, local.clamp(0, self.rows - 1).unsqueeze(1)).squeeze(1).double()
        return self._group.all_reduce(found.where(mine, 0.0))


def _edges_of(values: Tensor, mass: Tensor, floor: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """(edges [n, 1], covered [n]) from ``values`` [n, m], scores in falling order of which all above ``floor`` [n, 1] are complete.

    ``mass`` [n, 1]: sum of exp(score - best) over whole rows. Ties with the last score kept are kept, as ``params.choose`` defines.
    """
    edges = torch.full_like(mass, -torch.inf)
    covered = torch.ones(len(params), dtype=torch.bool)
    weights = (values - values[:, :1]).exp()
    for row, p in enumerate(params):
        edge, known = -torch.inf, float(floor[row])
        line, total = values[row], float(mass[row])
        kept = weights[row]
        if 0 < p.top_k < line.numel():
            edge = float(line[p.top_k - 1])
            covered[row] &= edge > known
            kept = kept[line >= edge]
            total = float(kept.sum())
        if p.top_p < 1.0:
            cumulated = kept.cumsum(0)
            # Strictly better than entry i: all before the first of its equals.
            first = torch.searchsorted(-line[: len(kept)].contiguous(), -line[: len(kept)].contiguous())
            above = torch.where(first > 0, cumulated[(first - 1).clamp_min(0)], 0.0)
            last = int((above < p.top_p * total).sum()) - 1
            edge = max(edge, float(line[last]))
            covered[row] &= edge > known
        if p.min_p > 0.0:
            edge = max(edge, float(np.float32(float(line[0])) + np.float32(np.log(p.min_p))))
        edges[row] = edge
    return edges, covered
