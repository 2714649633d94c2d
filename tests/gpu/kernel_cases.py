"""Random steps for the GPU kernels and their results in float64, written without the package's own references.

Owns the poison: what a kernel must not read is NaN, what it must write is NaN before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.kernels.step_layout import DeviceLayout, Heads, LayoutShape, Paging, fill_layout, step_shape, view_layout

FP8 = torch.float8_e4m3fn
#: ||out - ref|| / ||ref|| that a kernel may have, by dtype: rounding of the result and, for attention, of the softmax's weights.
BOUNDS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(out: Tensor, expected: Tensor) -> float:
    """Relative error; NaN when anything is NaN."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Case:
    """A step over ``starts``, ``lengths`` [R], sequence r in slot ``slots[r]``. ``layout`` is on ``device``; ``tables`` [slots, width]."""

    heads: Heads
    dim: int
    block: int
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    tables: np.ndarray
    layout: DeviceLayout
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> list[tuple[int, int]]:
        """(sequence, position) of each query token."""
        return [(r, p) for r, (s, n) in enumerate(zip(self.starts, self.lengths, strict=True)) for p in range(s, s + n)]

    def lines(self, sequence: int, count: int) -> list[int]:
        """Places in the flat cache of the first ``count`` tokens of ``sequence``."""
        table = self.tables[self.slots[sequence]]
        return [int(table[p // self.block]) * self.block + p % self.block for p in range(count)]


def make_case(
    heads: Heads,
    dim: int,
    block: int,
    sequences: list[tuple[int, int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    shape: LayoutShape | None = None,
    segment: int | None = None,
    seed: int = 0,
) -> Case:
    """``sequences``: (start, length). Slots are shuffled, and so are the blocks of every table."""
    random = np.random.default_rng(seed)
    starts, lengths = [s for s, _ in sequences], [n for _, n in sequences]
    count = len(sequences) + 3
    slots = random.permutation(count)[: len(sequences)]
    width = -(-max(s + n for s, n in sequences) // block) + 1
    tables = random.permutation(count * width).astype(np.int32).reshape(count, width)
    shape = shape or step_shape(np.array(lengths, np.int32), heads)
    packed = np.zeros(shape.size, np.int32)
    fill_layout(shape, packed, slots.astype(np.int32), np.array(starts, np.int32), np.array(lengths, np.int32), heads, segment)
    paging = Paging.over(torch.from_numpy(tables).to(device, torch.int32), heads)
    layout = view_layout(shape, torch.from_numpy(packed).to(device), paging)
    return Case(heads, dim, block, slots.tolist(), starts, lengths, tables, layout, device, dtype)


def random_cache(case: Case, *, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Keys and values of every sequence's context, NaN wherever no sequence's context is."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.tables.size, case.block, 2 * case.heads.kv, case.dim)
    cache = torch.full(shape, torch.nan)
    flat = cache.view(-1, *shape[2:])
    for sequence, (start, length) in enumerate(zip(case.starts, case.lengths, strict=True)):
        lines = case.lines(sequence, start + length)
        flat[lines] = torch.randn(len(lines), *shape[2:], generator=generator)
    return cache.to(dtype).to(case.device)


def attention(case: Case, query: Tensor, cache: Tensor, *, window: int | None = None, softcap: float | None = None) -> Tensor:
    """[T, heads * dim] in float64."""
    flat = cache.cpu().float().double().view(-1, 2 * case.heads.kv, case.dim)
    kv, group = case.heads.kv, case.heads.query // case.heads.kv
    out = []
    for token, (sequence, position) in enumerate(case.positions()):
        read = flat[case.lines(sequence, position + 1)[-(window or 0) :]]
        asked = query[token].cpu().double().view(kv, group, case.dim)
        scores = torch.einsum("kgd,ckd->kgc", asked, read[:, :kv]) / case.dim**0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        out.append(torch.einsum("kgc,ckd->kgd", scores.softmax(-1), read[:, kv:]).reshape(-1))
    return torch.stack(out)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` [n, dim] turned by halves, ``angles`` [dim / 2]; float64."""
    low, high = x.double().chunk(2, -1)
    cosine, sine = angles.double().cos(), angles.double().sin()
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
