"""Child processes that cannot outlive this process, and a gang's processes in ``/proc``.

Owns the thread that each child is forked from. Must never wait without a bound, nor signal a process that does not carry the gang's tag.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workers.protocol.errors import EnvironmentFault

#: Environment variable that every process of a gang inherits: with it, processes can be found even if they fork, daemonise or are orphaned.
TAG = "TRIREME_GANG"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02

# Loaded before any fork: a child of a threaded process may call into it but must not import or allocate much.
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent_thread() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class ChildProcess:
    """One process in its own session, killed by the kernel when this process dies.

    PR_SET_PDEATHSIG is bound to the *thread* that forked. So the child has a thread that lives as long as it: the thread forks the child,
    passes its output line by line to ``on_line``, and at the end calls ``on_exit`` with the raw return code (negative = signal). Both are
    called in that thread.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        log: Path | None = None,
        on_line: Callable[[str], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        """Raises :class:`EnvironmentFault` when the program cannot be started."""
        self._argv, self._env, self._cwd, self._log = list(argv), dict(env), cwd, log
        self._on_line, self._on_exit = on_line, on_exit
        self._process: subprocess.Popen[str] | None = None
        self._fault: OSError | None = None
        self._forked = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._keep, name=f"child {Path(argv[0]).name}", daemon=True).start()
        self._forked.wait()
        if self._fault is not None:
            raise EnvironmentFault(f"cannot start {argv[0]}", self._fault.strerror or str(self._fault), "trireme doctor") from None

    def _keep(self) -> None:
        try:
            process = self._spawn()
        except OSError as fault:
            self._fault = fault
            self._forked.set()
            return
        self._process = process
        self._forked.set()
        if process.stdout is not None:
            for line in process.stdout:
                if self._on_line is not None:
                    self._on_line(line.rstrip("\n"))
        code = process.wait()
        self._ended.set()
        if self._on_exit is not None:
            self._on_exit(code)

    def _spawn(self) -> subprocess.Popen[str]:
        output: int = subprocess.PIPE
        if self._log is not None:
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                self._argv,
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_die_with_parent_thread,  # noqa: PLW1509 - one call into a library that is already loaded
            )
        finally:
            if self._log is not None:
                os.close(output)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode if self._process is not None and self._ended.is_set() else None

    def wait(self, timeout_s: float) -> int | None:
        """The raw return code, or None when the child still runs after ``timeout_s``."""
        self._ended.wait(timeout_s)
        return self.returncode

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the child or to its whole process group. Does nothing when the child has ended."""
        if self._ended.is_set():
            return
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            return


def exit_with(pid: int) -> None:
    """End this process, and so all its children, at once when process ``pid`` ends."""
    file = os.pidfd_open(pid)

    def watch() -> None:
        select.select([file], [], [])
        os._exit(1)

    threading.Thread(target=watch, name=f"watch of {pid}", daemon=True).start()


def adopt_orphans() -> None:
    """Make this process the new parent of orphaned descendants. Raises :class:`EnvironmentFault` if the kernel does not support it."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise EnvironmentFault("cannot adopt orphaned processes", os.strerror(ctypes.get_errno()), "Linux is needed")


def alive(pid: int) -> bool:
    """Whether ``pid`` runs on this host; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def death_signal(pid: int) -> int | None:
    """The signal that ended ``pid`` if its zombie can still be read, else None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[49]) if fields[0] == "Z" and len(fields) > 49 else 0
    return status & 0x7F or None


def tagged(tag: str) -> list[int]:
    """Every living process of this host whose environment carries the gang's ``tag``, this process excepted."""
    wanted = f"{TAG}={tag}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0") and alive(int(entry)):
            found.append(int(entry))
    return found


def kill_tagged(tag: str, bound_s: float = 5.0) -> list[int]:
    """SIGKILL every process of the gang on this host until none is left; returns the pids that still live after ``bound_s``."""
    deadline = time.monotonic() + bound_s
    while True:
        left = tagged(tag)
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_S)
