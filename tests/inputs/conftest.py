"""One world for all tables and the fuzzing: what one bad input leaves behind, the next good request meets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.inputs.world import World
from tests.support.gang import short_folder


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with short_folder() as folder, World(folder) as made:
        yield made
        made.alive()
