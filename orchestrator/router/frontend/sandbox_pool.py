"""The sandbox pool: gives jobs to sandbox worker processes, and kills and replaces a process that exceeds the time limit.

Owns the processes. A job that takes more CPU time than :data:`LIMIT_S` fails its own request and costs one process, but never blocks the
event loop, and the next job goes to another process. A job whose process is stopped or starved is not blamed: after :data:`PATIENCE_S`
it is answered as unavailable. To be used from one event loop only.

    starting --answers the setup--> free --a job--> busy --its answer--> free
    starting, busy --too costly, too late, or ended--> killed, and replaced by a new one
    starting --refuses the setup--> ended, and not replaced: a template is broken
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec

from orchestrator.router import request_context
from orchestrator.router.frontend.chat_template import MAX_RENDERED, PromptPiece, TemplateSource
from orchestrator.router.frontend.fair_turns import FairTurns
from orchestrator.router.frontend.sandbox_worker import (
    HEADER_BYTES,
    Answer,
    GrammarJob,
    Job,
    JobRefused,
    Rendered,
    RenderJob,
    SandboxSetup,
)
from workers.protocol.errors import ArtifactError, EnvironmentFault, Overloaded, Rejected, Unavailable
from workers.protocol.messages import GuideSpec
from workers.protocol.running_clock import LONGEST_TURN_S, RunningClock

#: Seconds of its process's CPU time that one job may take, seconds that it may take in all where its process gets less, seconds that a job
#: may wait for a free process, and that a new process may take to be ready. They count while this process runs.
LIMIT_S, PATIENCE_S, WAIT_S, START_S = 2.0, 30.0, 5.0, 30.0
#: Seconds before the next try when a process did not start.
RETRY_S = 1.0
#: Longest answer, bytes: the longest prompt at four bytes a character, and as much again for the structure around it.
MAX_ANSWER = 8 * MAX_RENDERED

#: The one grammar that needs no check.
ANY_JSON = GuideSpec(kind="json")

log = logging.getLogger("trireme.sandbox")
T = TypeVar("T")


class _Gone(Exception):
    """The process ended, or sent what is no answer."""


class _Costly(Exception):
    """The job took more CPU time than it may."""


class _Process:
    """One sandbox worker process and the socket to it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "orchestrator.router.frontend.sandbox_worker"]
        self._socket, worker_socket = socket.socketpair()
        self._socket.setblocking(False)
        with worker_socket:
            self._popen = subprocess.Popen(command, stdin=worker_socket.fileno(), stdout=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def ask(self, frame: bytes) -> Answer:
        """Raises :class:`_Gone`."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, len(frame).to_bytes(HEADER_BYTES, "little") + frame)
            size = int.from_bytes(await self._read(HEADER_BYTES), "little")
            if size > MAX_ANSWER:
                raise _Gone
            answer: Answer = msgspec.msgpack.decode(await self._read(size), type=Answer)
            return answer
        except (OSError, msgspec.DecodeError):
            raise _Gone from None

    async def _read(self, count: int) -> bytes:
        loop, data, at = asyncio.get_running_loop(), bytearray(count), 0
        while at < count:
            got = await loop.sock_recv_into(self._socket, memoryview(data)[at:])
            if not got:
                raise _Gone
            at += got
        return bytes(data)

    def cpu_s(self) -> float:
        """CPU seconds that it has used. Raises :class:`_Gone`."""
        cpu_clock = (~self._popen.pid << 3) | 2  # what clock_getcpuclockid(3) makes of a pid on Linux
        try:
            return time.clock_gettime(cpu_clock)
        except OSError:
            raise _Gone from None

    def kill(self) -> None:
        self._socket.close()
        self._popen.kill()

    def reap(self) -> None:
        """Wait for the end of a killed process: freeing its memory takes the kernel a moment."""
        self._popen.wait(5.0)


class SandboxPool:
    """``count`` processes with the chat ``templates`` (by model name). The first job starts them if :meth:`start` was not called."""

    def __init__(self, templates: Mapping[str, TemplateSource], *, count: int = 2, limit_s: float = LIMIT_S) -> None:
        self._setup = msgspec.msgpack.encode(SandboxSetup(templates=dict(templates)))
        self._count, self._limit_s = count, limit_s
        self._living: set[_Process] = set()
        self._free: asyncio.Queue[_Process] = asyncio.Queue()
        self._turns = FairTurns(count)
        self._tasks: set[asyncio.Task[None] | asyncio.Future[None]] = set()
        self._started = self._closed = False
        self._settled = asyncio.Event()
        self._broken: JobRefused | None = None
        #: Processes that ended, or were killed, during a job.
        self.lost = 0

    def start(self) -> None:
        if not self._started:
            self._started = True
            for _ in range(self._count):
                self._keep(asyncio.get_running_loop().create_task(self._supply()))

    async def ready(self) -> None:
        """Wait until a process has compiled every template. Raises ArtifactError for one that cannot be compiled, with file and line, and
        EnvironmentFault where no process starts."""
        self.start()
        try:
            async with asyncio.timeout(START_S):
                await self._settled.wait()
        except TimeoutError:
            why = f"none was ready after {START_S:g} s: the host is overloaded, or a template takes as long to compile"
            raise EnvironmentFault("no process for chat templates started", why, "see the router's log") from None
        if self._broken is not None:
            raise ArtifactError(self._broken.what, self._broken.why, self._broken.hint)

    def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.cancel()
        for process in self._living:
            process.kill()
            process.reap()
        self._living.clear()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._living]

    async def render(self, job: RenderJob) -> list[PromptPiece]:
        """The prompt as pieces. Raises Rejected (also where rendering takes too long) and Overloaded."""
        answer = await self._ask(job, "messages", "invalid_request", "the chat template")
        assert isinstance(answer, Rendered)
        return answer.pieces

    async def check(self, guide: GuideSpec, param: str) -> None:
        """Raises Rejected (``invalid_schema``, with the field ``param``) for a grammar that does not compile within the time limit, and
        Overloaded."""
        if guide != ANY_JSON:
            await self._ask(GrammarJob(guide=guide), param, "invalid_schema", "the grammar")

    async def _ask(self, job: Job, param: str, code: str, subject: str) -> Answer:
        try:
            frame = msgspec.msgpack.encode(job)
        except (OverflowError, ValueError) as error:
            raise Rejected(f"{param}: {str(error)[:120]}", param=param) from None
        # The first process may have ended before it got the job. A job that ended two processes would end more.
        for _ in range(2):
            try:
                answer = await self._try(frame)
            except _Costly:
                raise Rejected(f"{param}: {subject} took longer than {self._limit_s:g} s", code=code, param=param) from None
            except TimeoutError:
                # The job is not to blame: its process hardly ran.
                why = f"it was not done after {PATIENCE_S:g} s, and its process got too little CPU time: the host is overloaded"
                raise Unavailable(f"{subject} could not be worked on", why, "retry later", retry_after=1.0) from None
            except _Gone:
                continue
            if isinstance(answer, JobRefused):
                what = answer.what if answer.param else f"{param}: {answer.what}"
                raise Rejected(what, answer.why, code=answer.code, param=answer.param or param)
            return answer
        raise Rejected(f"{param}: {subject} ended the process that worked on it", code=code, param=param)

    async def _try(self, frame: bytes) -> Answer:
        """Raises TimeoutError, :class:`_Costly` and :class:`_Gone`. After these, and after a cancellation, the process is replaced."""
        self.start()
        async with AsyncExitStack() as stack:

            async def take() -> _Process:
                await stack.enter_async_context(self._turns.turn(request_context.caller()))
                return await self._free.get()

            try:
                process = await _within(WAIT_S, take())
            except TimeoutError:
                raise Overloaded("too many templates and grammars at a time", retry_after=1.0) from None
            return await self._run(process, frame)

    async def _run(self, process: _Process, frame: bytes) -> Answer:
        answered = False
        try:
            limit = process.cpu_s() + self._limit_s

            def check() -> None:
                if process.cpu_s() >= limit:
                    raise _Costly

            answer = await _within(max(PATIENCE_S, self._limit_s), process.ask(frame), check)
            answered = True
        finally:
            if answered:
                self._free.put_nowait(process)
            else:
                self.lost += 1
                log.warning("process %d for templates and grammars was lost during a job (%d so far)", process.pid, self.lost)
                self._replace(process)
        return answer

    def _replace(self, process: _Process) -> None:
        self._discard(process)
        if not self._closed:
            self._keep(asyncio.get_running_loop().create_task(self._supply()))

    def _discard(self, process: _Process) -> None:
        if process in self._living:
            self._living.remove(process)
            process.kill()
            self._keep(asyncio.get_running_loop().run_in_executor(None, process.reap))

    async def _supply(self) -> None:
        """Start one process; try again until it is ready."""
        while not self._closed:
            try:
                process = _Process()
            except OSError as error:
                log.error("no process for templates could be started: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            self._living.add(process)
            try:
                answer = await _within(START_S, process.ask(self._setup))
            except (TimeoutError, _Gone):
                log.error("a process for templates did not start")
                self._discard(process)
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(answer, JobRefused):
                self._broken = answer
                self._discard(process)
            else:
                self._free.put_nowait(process)
            self._settled.set()
            return

    def _keep(self, task: asyncio.Task[None] | asyncio.Future[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _within(bound_s: float, work: Coroutine[Any, Any, T], check: Callable[[], None] = lambda: None) -> T:
    """The result of ``work``; raises TimeoutError when it takes longer than ``bound_s`` seconds in which this process runs, and what
    ``check`` raises, which is called from time to time."""
    task = asyncio.get_running_loop().create_task(work)
    begin = time.monotonic()
    clock = RunningClock(begin)
    try:
        while (left := begin + bound_s - clock.at(time.monotonic())) > 0:
            await asyncio.wait((task,), timeout=min(left, LONGEST_TURN_S / 2))
            clock.turn(time.monotonic())
            if task.done():
                return task.result()
            check()
        raise TimeoutError
    finally:
        if task.cancel():
            await asyncio.wait((task,))
