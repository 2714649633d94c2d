"""The GPU's kernels in plain torch, on the layouts that the Triton kernels read: a GPU runner is tested with them where there is no GPU.

Slow and obvious. A stage that is made with this module as its ``kernels`` takes a GPU's layouts on the CPU.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from workers.kernels import reference
from workers.kernels.reference import activate, add_layer_norm, add_rms_norm, embed, rms_norm, rotate
from workers.kernels.step_layout import HEADER_WORDS, NUMBER_MASK, DeviceLayout, Rings, SlotState, aligned
from workers.sampling.definition import MASK32, gumbel, mix

__all__ = [
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "best_candidates",
    "choose_tokens",
    "embed",
    "merge_candidates",
    "paged_attention",
    "resolve_placeholders",
    "rope_rows",
    "rope_store",
    "rope_table",
    "take_submission",
]

rope_table = reference.rope_table


def rope_rows(table: Tensor, layout: DeviceLayout) -> Tensor:
    return table[:, layout.positions.clamp_min(0).long()].unsqueeze(2)


def rope_store(qkv: Tensor, cache: Tensor, rope: Tensor | None, layout: DeviceLayout, norm: Tensor | None, eps: float) -> None:
    kv = cache.shape[2] // 2
    rotated = qkv[:, : qkv.shape[1] - kv]
    if norm is not None:
        rotated.copy_(rms_norm(rotated, torch.ones(qkv.shape[2]), eps).mul_(norm))
    if rope is not None:
        rotate(rotated[..., : rope.shape[-1]], rope[0], rope[1])
    size = cache.shape[1]
    for token, (position, slot) in enumerate(zip(layout.positions.tolist(), layout.slots.tolist(), strict=True)):
        if position >= 0:
            block = int(layout.paging.tables[slot, position // size])
            cache[block, position % size] = qkv[token, qkv.shape[1] - 2 * kv :]


def paged_attention(
    query: Tensor,
    cache: Tensor,
    layout: DeviceLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    total, heads, dim = query.shape
    kv, size = cache.shape[2] // 2, cache.shape[1]
    out = torch.zeros(total, heads * dim, dtype=query.dtype)
    for token, (position, slot) in enumerate(zip(layout.positions.tolist(), layout.slots.tolist(), strict=True)):
        if position < 0:
            continue
        blocks = layout.paging.tables[slot, : position // size + 1].long()
        first = 0 if window is None else max(0, position + 1 - window)
        read = cache[blocks].reshape(-1, 2 * kv, dim)[first : position + 1].transpose(0, 1)
        scores = query[token].view(kv, heads // kv, dim) @ read[:kv].transpose(1, 2) * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        out[token] = (scores.softmax(-1) @ read[kv:]).reshape(-1)
    return out


def take_submission(rings: Rings, memory: Tensor, state: SlotState, returned: Tensor) -> None:
    number = (int(rings.taken[0]) + 1) & NUMBER_MASK
    entry = rings.submissions[number % len(rings.submissions)]
    words, updates, returns, step = entry[:4].tolist()
    begins = list(accumulate(map(aligned, (words, updates, updates)), initial=HEADER_WORDS))
    inputs, indices, values, last = (entry[begin:][:count] for begin, count in zip(begins, (words, updates, updates, returns), strict=True))
    memory[:words] = inputs
    state.words[indices.long()] = values
    state.words[last.long()] = returned[:returns]
    rings.taken[0], rings.taken[1], rings.read[0] = number, step, number


def resolve_placeholders(tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor:
    found = torch.where(tokens < 0, state.tokens[slots.long()], tokens)
    tokens.fill_(-1)
    return found


def best_candidates(logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor:
    """[1, 3, S]: one part."""
    found = torch.zeros(3, len(logits), dtype=torch.int32)
    for row, (raw, slot) in enumerate(zip(logits.float(), slots.tolist(), strict=True)):
        broken = raw.isnan() | (raw == torch.inf)
        scores = raw.masked_fill(broken, -torch.inf)
        temperature = state.temperatures[slot]
        if temperature > 0:
            a, b = (int(word) & MASK32 for word in state.seeds[slot])
            k = mix((int(positions[row]) + 1 + b) & MASK32)
            j = mix(k ^ a)
            bits = [mix(mix((start + i + k) & MASK32) ^ j) for i in range(len(raw))]
            scores = scores / temperature + torch.from_numpy(gumbel(np.asarray(bits, np.uint32)))
        best = int(scores.argmax())
        found[0, row] = scores[best].view(torch.int32)
        found[1, row] = start + best
        found[2, row] = int(broken.any())
    return found.unsqueeze(0)


def merge_candidates(best: Tensor) -> Tensor:
    return best[0]


def choose_tokens(best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, rings: Rings) -> None:
    scores = best[:, 0].contiguous().view(torch.float32)
    chosen = scores.argmax(0, keepdim=True)
    broken = (best[:, 2] != 0).any(0) | (scores.max(0).values == -torch.inf)
    tokens = best[:, 1].gather(0, chosen)[0].masked_fill(broken, -1)
    step = int(rings.taken[1])
    rings.completions[step % len(rings.completions), : len(tokens)] = (tokens.long() & MASK32) | step << 32
    state.tokens.index_copy_(0, slots.long(), tokens.clamp_min(0))
    positions.add_(positions >= 0)
