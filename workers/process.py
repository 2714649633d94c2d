"""One rank as a Unix process: it dies with its parent, and writes to its own log file.

Owns no state. Must never import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys

from workers.logs import JsonLines, LogFormat
from workers.protocol.errors import EnvironmentFault, TriremeError

#: Exit code of a rank whose parent died while it started.
ORPHANED = 113
_PR_SET_PDEATHSIG = 1


class Alone(Exception):
    """An error that only this rank knows of: the others learn of it only by the end of their world."""

    def __init__(self, error: TriremeError) -> None:
        super().__init__(str(error))
        self.error = error


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, also by SIGKILL. A rank calls this first, because MPI launchers may leave
    orphans."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise EnvironmentFault("cannot bind this process to its parent's life", os.strerror(ctypes.get_errno()), "Linux is needed")
    if os.getppid() != parent:
        os._exit(ORPHANED)


def settle_heap() -> None:
    """Tune the garbage collector for serving. Objects of the start-up stay, so collections need not visit them (torch and its kernels are
    200,000 objects, 100 ms). A step makes hundreds of short-lived lists and few cycles: at the default threshold the collector takes a
    tenth of the time per token."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def unlink_shared_memory() -> None:
    """Unlink the shared memory that MPI has mapped: it then lasts only as long as its ranks, so a killed gang leaves none.

    Every rank must have mapped it, so call this after a collective of all ranks.
    """
    with open("/proc/self/maps") as maps:
        names = {path for line in maps if (path := line.rstrip("\n").partition("/dev/shm/")[2]) and not path.endswith(" (deleted)")}
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another rank of this host has unlinked it already
            os.unlink(f"/dev/shm/{name}")


def open_log(run_dir: str, rank: int, level: int = logging.INFO, form: LogFormat = "text", replica: str = "") -> int:
    """Send stdout and stderr to ``run_dir/rank<N>.log`` and set logging up; returns a descriptor of the old stderr.

    A rank's output must not pass through mpiexec's pipe: a stopped mpiexec would block the rank that writes.
    """
    terminal = os.dup(2)
    if run_dir:
        path = os.path.join(run_dir, f"rank{rank}.log")
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentFault(f"cannot write {path}", error.strerror or str(error), "run_dir must be a folder on every host") from None
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines(replica=replica, rank=rank) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return terminal


def tell(terminal: int, text: str) -> None:
    """Write a few lines to the old stderr; does not fail if it is closed."""
    try:
        os.write(terminal, (text + "\n").encode())
    except OSError:
        return
