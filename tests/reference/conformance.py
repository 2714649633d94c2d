"""What every Group must do, as one routine that each member runs; it raises AssertionError on the member that sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from workers.distributed.group import Group, InProcess, ordered_sum

T = TypeVar("T")
CPU = torch.device("cpu")


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


def close(found: torch.Tensor, total: torch.Tensor, parts: torch.Tensor, unit: float) -> bool:
    """Whether a sum of ``parts`` is as near to ``total`` as roundings of ``unit`` on the way allow, whatever cancels."""
    return bool(((found - total).abs() <= unit * parts.abs().sum(0)).all())


def conform(group: Group, device: torch.device = CPU) -> None:
    size, rank = group.size, group.rank
    parts = torch.stack([part(r) for r in range(size)]).to(device)
    total = ordered_sum(parts)
    found = group.all_reduce(part(rank).to(device))
    if group.deterministic:
        assert torch.equal(found, total), "a deterministic sum is in rank order"
    assert close(found, total, parts, 1e-6)
    gathered = group.all_gather(found)
    assert all(torch.equal(gathered[0], other) for other in gathered), "every rank holds the same sum"

    for count in (5, 8, 40_000, 300_000, 3_000_000):  # whatever way a transport takes for each size
        whole = (torch.arange(count) % 1000).float().to(device) + rank
        expected = sum(((torch.arange(count) % 1000).float().to(device) + r for r in range(size)), torch.zeros(count, device=device))
        assert torch.equal(group.all_reduce(whole.clone()), expected)
    half = part(rank, torch.bfloat16).to(device)
    parts = torch.stack([part(r, torch.bfloat16).float() for r in range(size)]).to(device)
    reduced = group.all_reduce(half)
    assert reduced.dtype == torch.bfloat16
    if size == 2 or group.deterministic:
        assert torch.equal(reduced, ordered_sum(parts).bfloat16()), "half precision is summed in fp32 and rounded once"
    assert close(reduced.float(), ordered_sum(parts), parts, 2**-7)

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.float64):
        own = (torch.arange(6).reshape(2, 3) + 10 * rank).to(dtype).to(device)
        got = group.all_gather(own)
        assert got.shape == (size, 2, 3) and got.dtype == dtype
        assert torch.equal(got.cpu(), torch.stack([(torch.arange(6).reshape(2, 3) + 10 * r).to(dtype) for r in range(size)]))
        root = size - 1
        told = group.broadcast(own.clone(), root)
        assert torch.equal(told.cpu(), (torch.arange(6).reshape(2, 3) + 10 * root).to(dtype))
    _pass_on(group, device, 1)
    _pass_on(group, device, -1)


def _pass_on(group: Group, device: torch.device, way: int) -> None:
    """Along the ranks as stages do, each receiving from the previous one and sending to the next one; ``way`` -1 = backwards."""
    rank, after, before = group.rank, group.rank + way, group.rank - way
    sends, receives = 0 <= after < group.size, 0 <= before < group.size
    for dtype in (torch.float32, torch.bfloat16):
        for count in range(3):  # in order, several under way
            if sends:
                group.send(torch.full((count + 1, 4), rank + count, dtype=dtype, device=device), after)
        for count in range(3):
            if receives:
                into = torch.empty(count + 1, 4, dtype=dtype, device=device)
                assert torch.equal(group.recv(into, before).cpu(), torch.full((count + 1, 4), before + count, dtype=dtype))
    # A large one does not fit any eager buffer: it must not need the receiver to be waiting already.
    if sends:
        group.send(torch.full((1 << 19,), float(rank), device=device), after)
    if receives:
        into = torch.empty(1 << 19, device=device)
        assert torch.equal(group.recv(into, before).cpu(), torch.full((1 << 19,), float(before)))
    # Nobody leaves, and frees what it sent, before all have received.
    group.all_reduce(torch.zeros(1, device=device))
