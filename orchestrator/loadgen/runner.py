"""Sends planned requests to a target, in an open or a closed loop, and keeps the tally.

Owns the tasks in flight and the timers. Open loop: a request's clock starts when it was to be sent, whether or not there was room or this
process was awake. Never more than ``concurrency`` requests are in flight, so memory is bounded whatever the server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

from orchestrator.loadgen import prompts
from orchestrator.loadgen.schedule import PlannedRequest
from orchestrator.loadgen.stats import RequestSample, RunStats
from orchestrator.loadgen.target import LoadTarget, TargetRequest
from workers.protocol.errors import TriremeError

clock = time.perf_counter
#: The generator looks this often whether its own timers come late, seconds.
_LOOK_S = 0.02


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``duration_s``: nothing is sent later than that after the start. ``timeout_s``: longest answer. ``words``: prompts as text."""

    concurrency: int
    seed: int
    timeout_s: float
    duration_s: float | None = None
    words: bool = False
    full: bool = True
    temperature: float = 0.0


class LoadRun:
    """One run. ``plan`` ends it; requests with a time make it an open loop, those without one a closed loop."""

    def __init__(self, target: LoadTarget, plan: Iterator[PlannedRequest], options: RunOptions, tally: RunStats) -> None:
        self._target, self._plan, self._options, self.tally = target, plan, options, tally
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(options.concurrency)
        self._stopped = asyncio.Event()
        self._defect: BaseException | None = None
        self._started = 0.0

    @property
    def elapsed(self) -> float:
        return clock() - self._started if self._started else 0.0

    def stop(self) -> None:
        """Send nothing more and give up what is in flight."""
        self._stopped.set()
        for task in self._tasks:
            task.cancel()

    async def run(self) -> None:
        """Until all has ended. Failures of requests are in the tally; raises what is no failure of theirs."""
        self._started = clock()
        lateness = asyncio.create_task(self._watch())
        try:
            for planned in self._plan:
                wanted = self._wanted(planned)
                if planned.at is None:
                    await self._room.acquire()
                if not await self._due(planned):
                    break
                if planned.at is not None:
                    await self._room.acquire()
                intended = clock() if planned.at is None else self._started + planned.at
                task = asyncio.create_task(self._one(planned, wanted, intended))
                self._tasks.add(task)
                task.add_done_callback(self._ended)
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            lateness.cancel()
            self.stop()
        if self._defect is not None:
            raise self._defect

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (defect := task.exception()) is not None:
            self._defect = defect
            self.stop()

    async def _due(self, planned: PlannedRequest) -> bool:
        """Wait for a request's time; False when the run ends before. What was due in time is sent, however late it has become."""
        limit = self._options.duration_s
        if limit is not None and (self.elapsed if planned.at is None else planned.at) >= limit:
            return False
        wait = 0.0 if planned.at is None else self._started + planned.at - clock()
        if wait > 0.0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), wait)
        else:
            await asyncio.sleep(0)
        return not self._stopped.is_set()

    async def _one(self, planned: PlannedRequest, wanted: TargetRequest, intended: float) -> None:
        tally, flight = self.tally, RequestSample(intended, planned.input)
        tally.begin(intended)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._target.ask(wanted, flight)
        except TimeoutError:
            tally.fail("timeout", f"no end within {self._options.timeout_s:g} s", clock())
        except TriremeError as error:
            tally.fail(error.code, str(error), clock())
        except asyncio.CancelledError:
            tally.abandon(clock())
        else:
            tally.done(flight)

    def _wanted(self, planned: PlannedRequest) -> TargetRequest:
        options = self._options
        make: Callable[[PlannedRequest, int], str | list[int]] = prompts.text if options.words else prompts.token_ids
        prompt = make(planned, options.seed)
        return TargetRequest(prompt=prompt, output=planned.output, seed=planned.index, full=options.full, temperature=options.temperature)

    async def _watch(self) -> None:
        while True:
            due = clock() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            self.tally.late.add(max(0.0, clock() - due))
