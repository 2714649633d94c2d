"""The lock of a deployment's host: a locked file that holds the host's pid. Owns that file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from workers.protocol.errors import EnvironmentFault


class HostLock:
    """Allows one host process per deployment; the kernel releases the lock when the process ends, however it ends."""

    def __init__(self, home: Path, name: str) -> None:
        """``home``: the deployment's folder. Raises :class:`EnvironmentFault` when another process holds the lock, or at an OSError."""
        path = home / "lock"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode() or "unknown"
            os.close(self._file)
            hint = f"end it with `trireme down {name}`, or give this one another --name"
            raise EnvironmentFault(f"the deployment {name} already runs", f"pid {holder} holds {path}", hint) from None
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(self._file)
            raise _unwritable(path, error) from None

    def release(self) -> None:
        os.close(self._file)


def _unwritable(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"cannot write {path}", error.strerror or str(error), "make room or give access there, or choose another --run-dir"
    )
