"""The Engine seam over TensorRT-LLM: rows, credit, continuation and progress, the same for both backends.

Owns the live rows and which job runs for which. A :class:`Runtime` runs jobs and batches them by itself; here is decided what is asked of
it. Must never wait longer than one poll, and never believe that a silent TensorRT-LLM works: jobs without an iteration end the replica.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.sequence import Delta, Job, TrtllmLimits, TrtllmSequence, make_row
from workers.protocol.engine import Emission, EngineStats
from workers.protocol.errors import EngineFault, TriremeError
from workers.protocol.messages import UNLIMITED, Capacity, SamplingParams, Submit
from workers.protocol.specs import ResumeClass

#: Seconds without credit after which a row's job is cancelled; it is asked for again when credit comes.
PAUSE_S = 2.0
#: How often a runtime is asked for its vitals while it has jobs, seconds.
VITALS_S = 0.05
#: Bound of closing, seconds.
CLOSE_S = 5.0

log = logging.getLogger("trireme.trtllm")


class RuntimeVitals(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime's newest iteration: counts of jobs, blocks (of ``block_size`` tokens), and totals of reused and missed blocks."""

    iteration: int = 0
    step_ms: float = 0.0
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0


class Runtime(Protocol):
    """One TensorRT-LLM that runs jobs; every call comes from the engine thread."""

    def start(self, job: Job) -> int:
        """Ask for a job; its handle is unique while it runs. Raises :class:`TriremeError` and then holds nothing."""

    def cancel(self, handle: int) -> None:
        """Drop a job; what still comes of it is for an unknown handle. Unknown ones are ignored."""

    def poll(self, wait_s: float) -> list[Delta]:
        """What came since the last poll, in order; waits up to ``wait_s`` for the first. Raises :class:`EngineFault` when it has failed."""

    def vitals(self) -> RuntimeVitals:
        """The newest iteration's; also takes in cache events. Raises :class:`EngineFault` when another rank is known to be gone."""

    def close(self, bound_s: float) -> None:
        """End it on every rank. Raises :class:`EngineFault` after ``bound_s``."""


def warm_up(runtime: Runtime, deadline: float, *, eos_ids: tuple[int, ...]) -> RuntimeVitals:
    """Have one token generated before anybody is told that the replica is ready: proves every rank, and brings the first statistics.

    ``deadline``: monotonic seconds. Raises :class:`EngineFault` when nothing comes of it, or no statistics do.
    """
    token = eos_ids[0] if eos_ids else 0
    params = SamplingParams(temperature=0.0, max_tokens=1)
    job = Job(id=0, input_ids=[token], max_new=1, min_new=0, seed=0, stops=(), params=params, salt="")
    handle, over = runtime.start(job), False
    vitals = RuntimeVitals()
    while not over or not vitals.num_blocks:
        if time.monotonic() > deadline:
            what = "TensorRT-LLM did not answer its warm-up request" if not over else "TensorRT-LLM gives no KV cache statistics"
            raise EngineFault(what, "the time to start is over", "see the ranks' logs, or raise trtllm.start_timeout_s")
        for delta in runtime.poll(0.05):
            if delta.handle == handle and delta.error:
                raise EngineFault("TensorRT-LLM failed its warm-up request", delta.error)
            over |= delta.handle == handle and delta.final
        fresh = runtime.vitals()
        vitals = fresh if fresh.num_blocks else vitals
    return vitals


class TrtllmEngine:
    """Implements :class:`workers.protocol.engine.Engine` on rank 0.

    Args:
        runtime: warmed up.
        limits: what rows are checked against.
        prefixes: told what rows will store; the runtime tells it what was stored.
        poll_s: longest wait of one step.
        hang_s: a runtime with jobs that neither answers nor iterates for so long has failed.
    """

    resume: ResumeClass = "valid"

    def __init__(
        self,
        runtime: Runtime,
        limits: TrtllmLimits,
        prefixes: HotPrefixes,
        *,
        poll_s: float,
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime, self._limits, self._prefixes = runtime, limits, prefixes
        self._poll_s, self._hang_s, self._clock = poll_s, hang_s, clock
        self._rows: dict[int, TrtllmSequence] = {}
        self._jobs: dict[int, TrtllmSequence] = {}
        self._ready: dict[int, TrtllmSequence] = {}
        self._paused: dict[int, TrtllmSequence] = {}
        self._vitals = RuntimeVitals(num_blocks=limits.capacity.num_blocks, free_blocks=limits.capacity.num_blocks)
        self._vitals_at = 0.0
        self._progress_at = 0.0
        self._steps = self._prompt_tokens = self._output_tokens = self._preemptions = 0

    @property
    def capacity(self) -> Capacity:
        return self._limits.capacity

    def submit(self, id: int, request: Submit) -> None:
        if id in self._rows:
            raise ValueError(f"row {id} is live already")
        row = make_row(id, request, self._limits)
        if row.startable:
            self._start(row)
        elif row.credit <= 0 and row.end is None:
            self._paused[id] = row
        else:
            self._ready[id] = row
        self._rows[id] = row
        self._prompt_tokens += len(request.prompt_ids)

    def cancel(self, id: int) -> None:
        row = self._rows.pop(id, None)
        if row is not None:
            self._ready.pop(id, None)
            self._paused.pop(id, None)
            self._stop(row)

    def credit(self, id: int, tokens: int) -> None:
        row = self._rows.get(id)
        if row is not None:
            row.credit = min(row.credit + tokens, UNLIMITED)
            if row.credit > 0:
                self._paused.pop(id, None)
                self._ready[id] = row

    def step(self) -> list[Emission]:
        """Take what TensorRT-LLM generated. Raises EngineFault when it makes no progress."""
        self._steps += 1
        now = self._clock()
        self._park(now)
        deltas = self._runtime.poll(0.0 if self._ready else self._poll_s)
        for delta in deltas:
            self._take(delta)
        emissions = []
        for id, row in list(self._ready.items()):
            del self._ready[id]
            if row.ready:
                emissions.append(row.emit())
            self._settle(row)
        self._output_tokens += sum([len(emission.tokens) for emission in emissions])
        self._watch(bool(deltas))
        return emissions

    def busy(self) -> bool:
        return bool(self._jobs or self._ready)

    def on_idle(self) -> None:
        return

    def predicted_ms(self) -> float:
        return max(self._poll_s * 1000.0, self._vitals.step_ms)

    def stats(self) -> EngineStats:
        """Raises :class:`EngineFault` when another rank is known to be gone, busy or not."""
        self._refresh()
        vitals, size = self._vitals, self.capacity.block_size
        return EngineStats(
            steps_total=self._steps,
            running=len(self._jobs) - min(vitals.waiting, len(self._jobs)),
            waiting=len(self._rows) - len(self._jobs) + min(vitals.waiting, len(self._jobs)),
            free_blocks=vitals.free_blocks,
            num_blocks=vitals.num_blocks,
            prefill_tokens=sum(len(row.prompt_ids) + row.begun for row in self._jobs.values() if len(row.tokens) == row.begun),
            step_ms=vitals.step_ms,
            prompt_tokens_total=self._prompt_tokens,
            output_tokens_total=self._output_tokens,
            prefix_queries_total=(vitals.reused_blocks + vitals.missed_blocks) * size,
            prefix_hits_total=vitals.reused_blocks * size,
            preemptions_total=self._preemptions,
            prefixes=self._prefixes.hot(),
        )

    def close(self) -> None:
        self._runtime.close(CLOSE_S)

    def check(self) -> None:
        """Prove that every row is in exactly one state. Raises AssertionError."""
        assert self._jobs == {row.handle: row for row in self._rows.values() if row.handle}, "a job without a row, or a row without its job"
        assert self._ready.keys() <= self._rows.keys() and self._paused.keys() <= self._rows.keys(), "a queue holds a row that is over"
        assert all(row.credit <= 0 for row in self._paused.values()), "a paused row has credit"
        for id, row in self._rows.items():
            assert row.handle or id in self._ready or id in self._paused, "a row waits for nothing"
            assert row.emitted <= len(row.tokens), "more was emitted than is known"

    def _start(self, row: TrtllmSequence) -> None:
        self._prefixes.expect(row.prompt_ids + row.tokens, row.salt)
        if not self._jobs:
            self._progress_at = self._clock()
        row.begun = len(row.tokens)
        row.handle = self._runtime.start(row.job())
        self._jobs[row.handle] = row

    def _stop(self, row: TrtllmSequence) -> None:
        """End its job, if one runs."""
        if row.handle:
            del self._jobs[row.handle]
            self._runtime.cancel(row.handle)
            row.handle = 0

    def _take(self, delta: Delta) -> None:
        row = self._jobs.get(delta.handle)
        if row is None:  # cancelled while it was on its way
            return
        row.take(delta)
        if delta.final or delta.error:
            del self._jobs[delta.handle]
            row.handle = 0
        elif row.end is not None:
            self._stop(row)
        self._ready[row.id] = row

    def _settle(self, row: TrtllmSequence) -> None:
        """Where a row belongs after it has emitted what it could."""
        if row.end is not None and row.emitted == len(row.tokens):
            del self._rows[row.id]
        elif row.credit <= 0:
            if row.id not in self._paused:
                row.paused_at = self._clock()
                self._paused[row.id] = row
        elif row.startable:
            try:
                self._start(row)
            except TriremeError as error:
                row.fail(error)
                self._ready[row.id] = row

    def _park(self, now: float) -> None:
        """A row that nobody reads gives up its place in TensorRT-LLM's cache."""
        for row in self._paused.values():
            if row.handle and now - row.paused_at >= PAUSE_S:
                self._stop(row)
                row.preemptions += 1
                self._preemptions += 1

    def _watch(self, heard: bool) -> None:
        now, before = self._clock(), self._vitals.iteration
        if now - self._vitals_at > VITALS_S:
            self._refresh()
        if heard or self._vitals.iteration != before or not self._jobs:
            self._progress_at = now
        elif now - self._progress_at > self._hang_s:
            raise EngineFault(
                f"TensorRT-LLM has made no iteration for {now - self._progress_at:.1f} s",
                f"{len(self._jobs)} requests wait: a rank hangs or was stopped",
                "the replica is replaced whole",
            )

    def _refresh(self) -> None:
        fresh = self._runtime.vitals()
        if fresh.num_blocks:
            self._vitals = fresh
        self._vitals_at = self._clock()
