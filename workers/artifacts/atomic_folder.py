"""Atomic folders: they are written next to the target under a lock, flushed to the disk, then renamed to it.

Owns the lock files and the names of unfinished folders (``.NAME.partial``). Must never change any folder except the target.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.protocol.errors import EnvironmentFault

#: Longest wait for another process that writes the same target, seconds: longer than any conversion.
LOCK_TIMEOUT_S = 3600.0
POLL_S = 0.05
#: Hint for a folder in which no file can be written.
MAKE_ROOM = "make room or give access there, or choose another folder"


@contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S, *, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is removed afterwards. The lock is released when its holder is killed.

    ``on_wait`` is called periodically while another process holds the lock; an exception that it raises ends the wait.

    Raises :class:`EnvironmentFault` when another process holds it for longer than ``timeout_s``, or the folder cannot be written.
    """
    deadline = time.monotonic() + timeout_s
    handle = _acquire(path)
    while handle is None:
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"{path} is held by another process", f"waited {timeout_s:g} s", "wait for it, or end it")
        on_wait()
        time.sleep(POLL_S)
        handle = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """An open locked descriptor, or None while someone else holds the lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(f"{path.parent} cannot be written", error.strerror or str(error), MAKE_ROOM) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder unlinks the file: a lock on a file that no longer has this name guards nothing.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder that becomes ``target`` when the block ends without an error, and is removed when the block raises.

    An existing ``target`` is replaced. The caller must flush the files that it writes into the folder.
    """
    aside, old = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.old"
    with locked(target.parent / f".{target.name}.lock"):
        # Remains of a killed process: the holder of the lock owns these names.
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            aside.mkdir()
            yield aside
            for folder in (aside, *filter(Path.is_dir, aside.iterdir())):
                _flush(folder)
            if target.exists():
                target.rename(old)
            aside.rename(target)
            _flush(target.parent)
        except OSError as error:
            raise EnvironmentFault(f"{target} cannot be written", error.strerror or str(error), MAKE_ROOM) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
