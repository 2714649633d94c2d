"""Dump files: whole or not there, this user's alone, and written without holding the event loop up."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from orchestrator.cli.debug import copy
from orchestrator.router import diagnostics
from orchestrator.router.core.history import RequestStory
from orchestrator.router.core.recorder import DumpPart, dump_lines
from orchestrator.router.diagnostics import Diagnostics
from workers.protocol.errors import EnvironmentFault

PARTS = [msgspec.msgpack.encode({"number": number, "bytes": "x" * 1000}) for number in range(100)]


class Past:
    now = unix_offset_s = 0.0

    def dump(self) -> list[DumpPart]:
        return PARTS

    def stories(self, request_id: str) -> list[RequestStory]:
        return []


def dump(file: Path) -> None:
    asyncio.run(Diagnostics("router0", Past(), file).dump())


def test_a_dump_is_written_in_bursts_so_that_the_event_loop_gets_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(diagnostics.time, "sleep", pauses.append)
    file = tmp_path / "router0.dump"
    dump(file)
    assert file.read_bytes().splitlines() == dump_lines(PARTS)
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(pauses) >= sum(map(len, PARTS)) // (diagnostics.BURST_BYTES + 2000) and min(pauses) > 0


def test_a_full_disk_leaves_the_dump_before_and_no_part_of_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "router0.dump"
    file.write_bytes(b"before")

    def full(part: bytes) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(diagnostics, "dump_line", full)
    with pytest.raises(EnvironmentFault) as found:
        dump(file)
    assert found.value.why == "No space left on device"
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


def test_the_copy_of_a_dump_is_this_users_alone(tmp_path: Path) -> None:
    source, file = tmp_path / "router0.dump", tmp_path / "incident.dump"
    source.write_bytes(b"lines")
    copy(source, file)
    assert file.read_bytes() == b"lines" and file.stat().st_mode & 0o777 == 0o600
