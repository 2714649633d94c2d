"""What a host writes to the rings that it shares with its device, and what it may believe of them. The device's side is tested in
tests/gpu/test_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.fake_device import FakeDevice
from workers.distributed.group import Waiter
from workers.kernels.step_layout import HEADER_WORDS, NUMBER_MASK, Rings
from workers.protocol.errors import EngineFault
from workers.runner.host_device_rings import Completions, Submissions
from workers.runner.slot_updates import SlotUpdates


class Broken(FakeDevice):
    def check(self) -> None:
        raise EngineFault("an illegal address was read")


def rings_of(depth: int = 4) -> Rings:
    return Rings.empty(FakeDevice().pinned, torch.device("cpu"), words=128, sequences=3, depth=depth)


@pytest.mark.parametrize("first", [0, NUMBER_MASK - 2])
def test_an_entry_is_written_again_only_when_the_device_has_read_it(first: int) -> None:
    rings = rings_of()
    rings.read.fill_(first)
    submissions, waited = Submissions(rings, FakeDevice(), Waiter("spin")), 0

    def read(self: Waiter, ready, bound_s: float | None = None) -> None:  # type: ignore[no-untyped-def]
        nonlocal waited
        if not ready():
            waited += 1
            rings.read.copy_((rings.read + 1) & NUMBER_MASK)  # the oldest entry is read
            assert ready()

    submissions._waiter.until = read.__get__(submissions._waiter)  # type: ignore[method-assign]
    for step in range(7):
        submissions.open(2)[:] = step
        submissions.send(step, 2, SlotUpdates())
    assert waited == 3
    numbers = [(first + 1 + step) & NUMBER_MASK for step in range(7)]
    headers = {number % 4: [2, 0, 0, step, *[0] * (HEADER_WORDS - 4), step, step] for step, number in enumerate(numbers)}
    assert [entry[: HEADER_WORDS + 2].tolist() for entry in rings.submissions] == [headers[i] for i in range(4)]


def test_slot_updates_follow_the_step_inputs() -> None:
    rings = rings_of()
    submissions = Submissions(rings, FakeDevice(), Waiter())
    room = submissions.room(6)
    assert 30 <= room <= 40
    submissions.open(6)[:] = 9
    updates = SlotUpdates(*(np.arange(begin, begin + room, dtype=np.int32) for begin in (100, 200, 300)))
    submissions.send(1, 6, updates)
    entry = rings.submissions[1].tolist()
    assert entry[:4] == [6, room, room, 1] and entry[HEADER_WORDS : HEADER_WORDS + 6] == [9] * 6
    step = -(-room // 4) * 4
    assert [entry[begin : begin + room] for begin in range(HEADER_WORDS + 8, HEADER_WORDS + 8 + 3 * step, step)] == [
        c.tolist() for c in updates
    ]


def test_a_step_is_complete_when_all_its_sequences_are() -> None:
    rings = rings_of()
    completion = Completions(rings, FakeDevice()).of(2**30 + 5, 3)
    ring = rings.completions[1]
    ring[:] = torch.tensor([1 << 32 | 7] * 3)  # of an earlier step
    for index, token in ((2, 8), (0, 9), (1, 2**32 - 1)):
        assert not completion.ready()
        ring[index] = 5 << 32 | token
    assert completion.ready() and completion.tokens.tolist() == [9, -1, 8]


def test_a_step_that_yields_nothing_is_complete_with_its_padding() -> None:
    rings = rings_of()
    completion = Completions(rings, FakeDevice()).of(3, 0)
    assert not completion.ready()
    rings.completions[3, 0] = 3 << 32
    assert completion.ready() and completion.tokens.tolist() == []


def test_a_device_that_broke_ends_the_wait() -> None:
    rings = rings_of()
    with pytest.raises(EngineFault, match="illegal address"):
        Waiter("spin").until(Completions(rings, Broken()).of(1, 1).ready, 20.0)
    submissions = Submissions(rings, Broken(), Waiter("spin"))
    with pytest.raises(EngineFault, match="illegal address"):
        for step in range(5):
            submissions.open(0)
            submissions.send(step, 0, SlotUpdates())
