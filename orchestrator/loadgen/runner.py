"""Sends planned requests to a target, in an open or a closed loop, and counts their results.

Owns the tasks in flight and the timers. Open loop: a request's clock starts at its planned time, even if there was no room or this process
was late. Never more than ``concurrency`` requests are in flight, so memory is bounded whatever the server does.
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
#: Time between two measurements of the generator's own timer delay, seconds.
_LATENESS_CHECK_S = 0.02


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``duration_s``: nothing is sent later than that after the start. ``timeout_s``: longest answer. ``words``: prompts as text."""

    concurrency: int
    seed: int
    timeout_s: float
    duration_s: float | None = None
    words: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0


class LoadRun:
    """One run. It ends with ``plan``; requests with a time make it an open loop, requests without one a closed loop."""

    def __init__(self, target: LoadTarget, plan: Iterator[PlannedRequest], options: RunOptions, stats: RunStats) -> None:
        self._target, self._plan, self._options, self.stats = target, plan, options, stats
        self._tasks: set[asyncio.Task[None]] = set()
        self._free_slots = asyncio.Semaphore(options.concurrency)
        self._stopped = asyncio.Event()
        self._defect: BaseException | None = None
        self._started = 0.0

    @property
    def elapsed(self) -> float:
        return clock() - self._started if self._started else 0.0

    def stop(self) -> None:
        """Send nothing more and abandon requests in flight."""
        self._stopped.set()
        for task in self._tasks:
            task.cancel()

    async def run(self) -> None:
        """Send all requests and wait until each has ended. Failures of requests are counted in the stats; raises any other error."""
        self._started = clock()
        lateness = asyncio.create_task(self._measure_lateness())
        try:
            for planned in self._plan:
                request = self._request(planned)
                if planned.at is None:
                    await self._free_slots.acquire()
                if not await self._due(planned):
                    break
                if planned.at is not None:
                    await self._free_slots.acquire()
                intended = clock() if planned.at is None else self._started + planned.at
                task = asyncio.create_task(self._one(planned, request, intended))
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
        self._free_slots.release()
        if not task.cancelled() and (defect := task.exception()) is not None:
            self._defect = defect
            self.stop()

    async def _due(self, planned: PlannedRequest) -> bool:
        """Wait until a request is due; False if the run ends before. A request that was due before the end is sent, even if it is late."""
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

    async def _one(self, planned: PlannedRequest, request: TargetRequest, intended: float) -> None:
        stats, sample = self.stats, RequestSample(intended, planned.input)
        stats.begin(intended)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._target.send(request, sample)
        except TimeoutError:
            stats.fail("timeout", f"no end within {self._options.timeout_s:g} s", clock())
        except TriremeError as error:
            stats.fail(error.code, str(error), clock())
        except asyncio.CancelledError:
            stats.abandon(clock())
        else:
            stats.done(sample)

    def _request(self, planned: PlannedRequest) -> TargetRequest:
        options = self._options
        make: Callable[[PlannedRequest, int], str | list[int]] = prompts.text if options.words else prompts.token_ids
        prompt = make(planned, options.seed)
        return TargetRequest(
            prompt=prompt, output=planned.output, seed=planned.index, ignore_eos=options.ignore_eos, temperature=options.temperature
        )

    async def _measure_lateness(self) -> None:
        while True:
            due = clock() + _LATENESS_CHECK_S
            await asyncio.sleep(_LATENESS_CHECK_S)
            self.stats.lateness.add(max(0.0, clock() - due))
