"""F15: the run folder's disk is full, at the start, under load, when something dies, and at the end."""

from __future__ import annotations

import pytest

from tests.faults.namespace import run_inside, script
from tests.support.gang import short_folder

pytestmark = [pytest.mark.mpi, pytest.mark.long]


def test_a_full_disk_stops_no_answer() -> None:
    with short_folder() as folder:
        (folder / "second").mkdir()
        steps = run_inside(["--mount"], script("tests.faults.full_disk", str(folder)), folder / "errors", bound_s=280)
    assert [line["step"] for line in steps] == [
        "serving goes on",
        "a replica that cannot start says why",
        "a router that cannot start does not end the others",
        "a full disk is no reason not to end well",
        "a start says ENOSPC",
    ]
