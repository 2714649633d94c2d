"""What a service manager hears of a command that it started: systemd's notification protocol (sd_notify(3), sd_watchdog_enabled(3)).

Owns one datagram socket. Says nothing where nobody asked for it, and must never hinder what it reports on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

#: How long a manager whose queue is full is waited for, seconds.
_PATIENCE_S = 1.0


class ServiceManager:
    """The manager behind ``NOTIFY_SOCKET``, if there is one. ``ready``, ``stopping`` and ``beat`` tell it what they are named after."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        interval, wanted_of = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", str(os.getpid()))
        watched = bool(self._address) and interval.isdigit() and wanted_of == str(os.getpid())
        # Half of the time that the manager waits, as its manual advises.
        self._every_s = int(interval) / 2e6 if watched else 0.0
        self._due = 0.0

    def ready(self, status: str) -> None:
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        self._tell("STOPPING=1\nSTATUS=draining")

    def beat(self) -> None:
        """Call this at every turn of the loop that must not hang; it tells the manager no more often than it needs to hear."""
        now = time.monotonic()
        if self._every_s and now >= self._due:
            self._due = now + self._every_s
            self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        # A manager that is being restarted, or whose queue is full, misses a message; the service goes on.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(_PATIENCE_S)
            manager.sendto(text.encode(), self._address)
