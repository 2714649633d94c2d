"""``trireme up FILE`` on a host whose wall clock is set back by an hour at SIGUSR2: only a test's own processes may have another time."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from orchestrator.config.deployment_file import load
from orchestrator.control.host import deployment

BACK_S = 3600


def set_back(number: int, frame: FrameType | None) -> None:
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() - BACK_S
    time.time_ns = lambda: nanoseconds() - BACK_S * 10**9


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, set_back)
    sys.exit(deployment.up(load(Path(sys.argv[-1])).config))
