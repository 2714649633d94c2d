"""One served door for all client tests; each test gets it with a fresh script."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.scripted_router import ServedDoor


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer")) as door:
        yield door


@pytest.fixture
def door(served: ServedDoor) -> ServedDoor:
    served.dispatcher.reset()
    return served
