"""What every Group must do, as one routine that each member runs; it raises AssertionError on the member that sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from workers.engine.comm import Group, InProcess, ordered_sum

T = TypeVar("T")


def in_threads(size: int, member: Callable[[Group], T]) -> list[T]:
    """Run ``member`` on every member of an InProcess group; the first failure wakes the others and is raised."""
    groups = InProcess.create(size)

    def guarded(group: InProcess) -> T:
        try:
            return member(group)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=120) for future in [pool.submit(guarded, group) for group in groups]]


def part(rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rank ``rank``'s own tensor, with sums that depend on their order."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(7, 33, generator=generator) * 10.0 ** torch.randint(-4, 5, (7, 33), generator=generator)).to(dtype)


def conform(group: Group) -> None:
    size, rank = group.size, group.rank
    parts = torch.stack([part(r) for r in range(size)])
    total = ordered_sum(parts)
    mine = part(rank)
    found = group.all_reduce(mine)
    assert found is mine, "all_reduce works in place"
    if group.deterministic:
        assert torch.equal(found, total), "a deterministic sum is in rank order"
    assert torch.allclose(found, total, rtol=1e-5, atol=1e-2)
    gathered = group.all_gather(found)
    assert all(torch.equal(gathered[0], other) for other in gathered), "every rank holds the same sum"

    whole = torch.arange(5.0) + rank
    assert torch.equal(group.all_reduce(whole.clone()), sum((torch.arange(5.0) + r for r in range(size)), torch.zeros(5)))
    half = part(rank, torch.bfloat16)
    expected = ordered_sum(torch.stack([part(r, torch.bfloat16).float() for r in range(size)]))
    reduced = group.all_reduce(half)
    assert reduced.dtype == torch.bfloat16
    assert torch.allclose(reduced.float(), expected, rtol=2**-7, atol=1e-2), "half precision is summed in fp32 and rounded once"

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64):
        own = (torch.arange(6).reshape(2, 3) + 10 * rank).to(dtype)
        got = group.all_gather(own)
        assert got.shape == (size, 2, 3) and got.dtype == dtype
        assert torch.equal(got, torch.stack([(torch.arange(6).reshape(2, 3) + 10 * r).to(dtype) for r in range(size)]))
        root = size - 1
        told = group.broadcast(own.clone(), root)
        assert torch.equal(told, (torch.arange(6).reshape(2, 3) + 10 * root).to(dtype))

    if size > 1:
        following, previous = (rank + 1) % size, (rank - 1) % size
        for dtype in (torch.float32, torch.bfloat16):
            for count in range(3):  # in order, several under way
                group.send(torch.full((count + 1, 4), rank + count, dtype=dtype), following)
            for count in range(3):
                into = torch.empty(count + 1, 4, dtype=dtype)
                assert torch.equal(group.recv(into, previous), torch.full((count + 1, 4), previous + count, dtype=dtype))
    # A large one does not fit any eager buffer: it must not need the receiver to be waiting already.
    if size > 1:
        group.send(torch.full((1 << 19,), float(rank)), (rank + 1) % size)
        assert torch.equal(group.recv(torch.empty(1 << 19), (rank - 1) % size), torch.full((1 << 19,), float((rank - 1) % size)))
    # Nobody leaves, and frees what it sent, before all have received.
    group.all_reduce(torch.zeros(1))
