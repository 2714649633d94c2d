"""Ranks agree while they come up: bytes reach all ranks, and one rank's error is raised by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.world import run
from workers.distributed.agreement import agree, all_or_none, complete
from workers.protocol.errors import ConfigError, EngineFault

pytestmark = pytest.mark.mpi


def test_an_error_of_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    found = run(3, "tests.mpi.agreement_program", tmp_path / "report.json", {})
    assert found["broadcast"] == "spec" * 1000 and found["gather"] == ["", "x", "xx"]
    assert found["none"] == [""] * 3
    other = "ConfigError: no such layout: rank 1: tp is 3"
    assert found["one"] == [other, "ConfigError: no such layout: tp is 3", other]
    assert found["two"] == [
        "ConfigError: first: found by rank 1",
        "ConfigError: first: ",
        "EngineFault: a rank could not be brought up: MemoryError: no room",
    ]


def test_a_world_of_one_raises_its_own_error() -> None:
    agree(None, None)
    with pytest.raises(EngineFault, match="could not be brought up"), all_or_none(None):
        raise MemoryError("no room")
    with pytest.raises(ConfigError, match="mine"):
        agree(None, ConfigError("mine"))


def test_a_rank_that_does_not_come_is_given_up() -> None:
    class Never:
        def Test(self) -> bool:  # noqa: N802 - MPI's name
            return False

    with pytest.raises(EngineFault, match="did not answer within"):
        complete(Never(), 0.05)
