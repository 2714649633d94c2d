"""Memory and descriptors of a deployment's processes over time. Owns the samples; a process that was replaced begins again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean, median

import psutil

from orchestrator.control.host.control_socket import DeploymentStatus
from tests.load.report import Report, say

#: Samples of a process's first seconds are its start, not its growth.
WARM_UP_S = 60.0
#: A growth is told of processes that were watched for so long after that, seconds.
WATCHED_S = 60.0
#: Allowed beside 5 %: an allocator's pages and a few more connections.
ALLOWED_MB = 3.0
FILES = 16


class Sample:
    """One process: (age in seconds, resident MB, open files) whenever it was looked at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[tuple[float, float, int]] = []

    def warm(self) -> list[tuple[float, float, int]]:
        return [row for row in self.rows if row[0] >= WARM_UP_S]


class Growth:
    """Samples by process id."""

    def __init__(self) -> None:
        self._samples: dict[int, Sample] = {}

    def look(self, status: DeploymentStatus) -> None:
        ranks = {pid: f"{row.name} rank {rank}" for model in status.models for row in model.replicas for rank, _, pid in row.pids}
        names = {status.pid: "host", **{pid: name for name, pid in status.routers.items()}, **ranks}
        now = time.time()
        for pid, name in names.items():
            try:
                process = psutil.Process(pid)
                row = (now - process.create_time(), process.memory_info().rss / 2**20, process.num_fds())
            except psutil.NoSuchProcess:
                continue
            self._samples.setdefault(pid, Sample(name)).rows.append(row)

    def tell(self, report: Report) -> None:
        """A line each for the processes that lived long enough; the later half of their samples against the earlier one."""
        for pid, sample in self._samples.items():
            warm = sample.warm()
            if len(warm) < 4 or warm[-1][0] - warm[0][0] < WATCHED_S:
                continue
            half = len(warm) // 2
            before, after = median(row[1] for row in warm[:half]), median(row[1] for row in warm[half:])
            say(f"{sample.name} (pid {pid}): {after:.1f} MB, slope {slope(warm):+.1f} MB/h over {warm[-1][0] - warm[0][0]:.0f} s")
            report.at_most(f"{sample.name}: memory growth", after - before, 0.05 * before + ALLOWED_MB, "MB")
            files = median(row[2] for row in warm[half:]) - median(row[2] for row in warm[:half])
            report.at_most(f"{sample.name}: open files more than before", files, FILES)


def slope(rows: Sequence[tuple[float, float, int]]) -> float:
    """MB an hour by least squares."""
    x, y = fmean(row[0] for row in rows), fmean(row[1] for row in rows)
    spread = sum((row[0] - x) ** 2 for row in rows)
    return 3600 * sum((row[0] - x) * (row[1] - y) for row in rows) / spread if spread else 0.0
