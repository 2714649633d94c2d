"""Reports the state of a host to the service manager that started it: sd_notify(3), sd_watchdog_enabled(3).

Reports nothing without ``NOTIFY_SOCKET``. A report that fails never stops the host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

#: Longest wait for a manager whose queue is full, seconds.
_PATIENCE_S = 1.0


class SystemdNotifier:
    """Sends the state of the host to the service manager behind ``NOTIFY_SOCKET``, if there is one."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        interval, wanted_of = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", str(os.getpid()))
        watched = bool(self._address) and interval.isdigit() and wanted_of == str(os.getpid())
        # Half of the time that the manager waits, as its manual advises.
        self._every_s = int(interval) / 2e6 if watched else 0.0
        self._due = 0.0

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=draining")

    def beat(self) -> None:
        """Notify the watchdog that the host's loop runs. Call it in every turn: it sends at most one message per half of the watchdog's
        interval."""
        now = time.monotonic()
        if self._every_s and now >= self._due:
            self._due = now + self._every_s
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A manager that is restarting, or whose queue is full, misses a message; the service continues.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(_PATIENCE_S)
            manager.sendto(text.encode(), self._address)
