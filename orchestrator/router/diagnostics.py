"""Diagnostics of a router: dumps of its last events, stories of single requests, and the usage of API keys.

Owns the dump file next to the router's state file: one file, mode 0600, replaced atomically by each dump. A dump is written to a file
because it may be far larger than a message. A story is one message: it has at most :data:`MAX_STORIES` requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from orchestrator.files import writing_private
from orchestrator.router.core.history import RequestStory
from orchestrator.router.core.recorder import DumpPart, dump_line
from orchestrator.router.key_limits import KeyUsage
from workers.protocol.errors import NotFound

#: Maximum number of requests in a story: the last ones of an id.
MAX_STORIES = 16
#: Bytes of a dump that are converted to lines without a pause (less than a millisecond of work), and the seconds of pause after it.
BURST_BYTES, PAUSE_S = 8192, 0.0002


class DumpReport(msgspec.Struct, frozen=True, kw_only=True):
    """A dump that was written. ``path``: on the router's host."""

    router: str
    path: str
    events: int
    bytes: int


class StoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to the requests with one id at one router, oldest first. ``now``: the core's time; add ``unix_offset_s`` to a time for
    seconds since 1970."""

    router: str
    now: float
    unix_offset_s: float
    stories: list[RequestStory]


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What API keys have used at one router."""

    router: str
    keys: list[KeyUsage]


class PastEvents(Protocol):
    """What this module reads of the dispatcher."""

    @property
    def unix_offset_s(self) -> float: ...

    @property
    def now(self) -> float: ...

    def dump(self) -> list[DumpPart]: ...

    def stories(self, request_id: str) -> list[RequestStory]: ...


class Diagnostics:
    """``file``: where dumps go; None = this router has no folder of its own, so it writes none. ``usage``: of each API key."""

    def __init__(
        self, router: str, past: PastEvents, file: Path | None, usage: Callable[[], list[KeyUsage]] = list
    ) -> None:  # fmt: skip
        self._router, self._past, self._file, self._usage = router, past, file, usage
        self._writing = asyncio.Lock()

    async def dump(self) -> DumpReport:
        """Write the last events into the file; a second dump waits for the first. Raises NotFound and EnvironmentFault."""
        if self._file is None:
            raise NotFound("this router writes no dumps", "it has no state file, hence no folder of its own")
        async with self._writing:
            parts = self._past.dump()
            # The parts never change, so the event loop can run while a thread converts them to lines.
            size = await asyncio.to_thread(_write, self._file, parts)
        return DumpReport(router=self._router, path=str(self._file), events=len(parts) - 3, bytes=size)

    def story(self, request_id: str) -> StoryReport:
        """What is known of ``request_id``; no stories where it is unknown, or no longer kept."""
        stories = self._past.stories(request_id)[-MAX_STORIES:]
        return StoryReport(router=self._router, now=self._past.now, unix_offset_s=self._past.unix_offset_s, stories=stories)

    def usage(self) -> UsageReport:
        """What each API key has used here."""
        return UsageReport(router=self._router, keys=self._usage())


def _write(file: Path, parts: list[DumpPart]) -> int:
    """Write ``parts`` as lines; returns the file's bytes. It pauses after every :data:`BURST_BYTES`: making lines holds the interpreter's
    lock, and the event loop would wait 5 ms for it at every turn."""
    size = burst = 0
    with writing_private(file) as out:
        for part in parts:
            size += out.write(dump_line(part) + b"\n")
            burst += len(part)
            if burst >= BURST_BYTES:
                burst = 0
                time.sleep(PAUSE_S)
    return size
