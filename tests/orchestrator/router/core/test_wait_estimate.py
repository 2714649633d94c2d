"""The expected wait at a replica."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.router.core.wait_estimate import expected_wait_ms


def test_expected_wait_counts_prefill_neighbours_and_a_full_batch() -> None:
    base: dict[str, Any] = {
        "step_ms": 10.0, "occupancy": 0, "max_batch_size": 8, "step_tokens": 100, "queued_tokens": 0, "known_tokens": 200,
        "cached_tokens": 0, "choice_ms": 800.0, "output_tokens": 50.0,
    }  # fmt: skip
    assert expected_wait_ms(**base) == 20.0
    assert expected_wait_ms(**base | {"cached_tokens": 100}) == 10.0
    assert expected_wait_ms(**base | {"queued_tokens": 300}) == 50.0
    assert expected_wait_ms(**base | {"occupancy": 8}) == pytest.approx(10.0 * (200 / 92 + 50 * 8 / 100) + 100.0)
