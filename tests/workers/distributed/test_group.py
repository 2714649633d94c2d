"""Groups that need no transport pass the conformance routine; waiting is bounded and gives the core away."""

from __future__ import annotations

import time

import pytest
import torch

from tests.reference.conformance import conform, in_threads
from workers.distributed.group import Solo, Waiter
from workers.protocol.errors import EngineFault


def test_solo_conforms() -> None:
    conform(Solo())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_in_process_conforms(size: int) -> None:
    in_threads(size, conform)


def test_a_member_that_fails_wakes_the_others() -> None:
    def member(group) -> None:  # type: ignore[no-untyped-def]
        if group.rank == 1:
            raise EngineFault("gone")
        group.all_reduce(torch.ones(2))

    with pytest.raises(EngineFault):
        in_threads(3, member)


@pytest.mark.parametrize("policy", ["hybrid", "spin"])
def test_waiting_is_bounded(policy) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineFault, match="did not answer"):
        Waiter(policy).until(lambda: False, bound_s=0.02)


def test_waiting_ends_with_the_condition() -> None:
    answers = iter([False] * 50 + [True])
    Waiter().until(lambda: next(answers), bound_s=30)


def test_an_idle_wait_costs_little_of_a_core() -> None:
    begin, cpu = time.monotonic(), time.process_time()
    Waiter().until(lambda: time.monotonic() - begin > 1.0, bound_s=30)
    assert time.process_time() - cpu < 0.25 * (time.monotonic() - begin)
