"""The check of every module of fault tests: at its end, no process that it started lives."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gang import wait_for

_MARK = "FAULT_TESTS"
_GONE_S = 5.0


def _marked(mark: str) -> list[int]:
    """Living processes that inherited this module's mark, however they were started and whoever is their parent now."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[0]
            if int(entry) != os.getpid() and state not in "ZX" and wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    yield
    del os.environ[_MARK]
    wait_for(lambda: not _marked(mark), _GONE_S, "the end of every process")
