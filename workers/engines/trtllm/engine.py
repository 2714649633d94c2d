"""The Engine protocol over TensorRT-LLM: sequences, credit, continuation and progress, the same for both backends.

Owns the live sequences and the job of each. A :class:`Runtime` runs jobs and batches them by itself; the engine decides which jobs it gets.
Must never wait longer than one poll. If jobs run and TensorRT-LLM makes no iteration, the replica ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.sequence import Delta, Job, TrtllmLimits, TrtllmSequence, make_sequence
from workers.protocol.engine import CLOSE_S, PAUSE_S, STATS_AGE_S, Emission
from workers.protocol.errors import EngineFault, TriremeError
from workers.protocol.messages import UNLIMITED, Capacity, SamplingParams, Submit
from workers.protocol.running_clock import RunningClock
from workers.protocol.specs import ResumeClass
from workers.protocol.status import EngineStats

log = logging.getLogger("trireme.trtllm")


class RuntimeStats(msgspec.Struct, frozen=True, kw_only=True):
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
        """Start a job; its handle is unique while it runs. If it raises :class:`TriremeError`, nothing was started."""

    def cancel(self, handle: int) -> None:
        """Drop a job; later output of it has an unknown handle. Unknown handles are ignored."""

    def poll(self, wait_s: float) -> list[Delta]:
        """The output since the last poll, in order; waits up to ``wait_s`` for the first. Raises :class:`EngineFault` if the runtime has
        failed."""

    def stats(self) -> RuntimeStats:
        """Statistics of the newest iteration; also reads cache events. Raises :class:`EngineFault` if another rank is known to be gone."""

    def close(self, bound_s: float) -> None:
        """End it on every rank. Raises :class:`EngineFault` after ``bound_s``."""


#: Longest plausible turn of the engine, seconds; after a longer one the process was frozen meanwhile.
_LONGEST_STEP_S = 1.0


def warm_up(runtime: Runtime, deadline: float, *, eos_ids: tuple[int, ...]) -> RuntimeStats:
    """Generate one token before the replica is ready: this tests every rank, and returns the first statistics.

    ``deadline``: monotonic seconds. Raises :class:`EngineFault` if no token or no statistics arrive.
    """
    token = eos_ids[0] if eos_ids else 0
    params = SamplingParams(temperature=0.0, max_tokens=1)
    job = Job(id=0, input_ids=[token], max_new=1, min_new=0, seed=0, stops=(), params=params, salt="")
    handle, over = runtime.start(job), False
    stats = RuntimeStats()
    while not over or not stats.num_blocks:
        if time.monotonic() > deadline:
            what = "TensorRT-LLM did not answer its warm-up request" if not over else "TensorRT-LLM gives no KV cache statistics"
            raise EngineFault(what, "the time to start is over", "see the ranks' logs, or raise trtllm.start_timeout_s")
        for delta in runtime.poll(0.05):
            if delta.handle == handle and delta.error:
                raise EngineFault("TensorRT-LLM failed its warm-up request", delta.error)
            over |= delta.handle == handle and delta.final
        fresh = runtime.stats()
        stats = fresh if fresh.num_blocks else stats
    return stats


class TrtllmEngine:
    """Implements :class:`workers.protocol.engine.Engine` on rank 0.

    Args:
        runtime: warmed up.
        limits: what requests are checked against.
        prefixes: gets from the engine the tokens that sequences will store, and from the runtime the stored blocks. poll_s: longest wait of
        one step. hang_s: a runtime with jobs and without output or iteration for this time has failed.
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
        self._sequences: dict[int, TrtllmSequence] = {}
        self._jobs: dict[int, TrtllmSequence] = {}
        self._ready: dict[int, TrtllmSequence] = {}
        self._paused: dict[int, TrtllmSequence] = {}
        self._stats = RuntimeStats(num_blocks=limits.capacity.num_blocks, free_blocks=limits.capacity.num_blocks)
        self._stats_at = 0.0
        self._running = RunningClock(clock(), _LONGEST_STEP_S)
        self._progress_at = 0.0
        self._prompt_tokens = self._output_tokens = self._preemptions = 0

    @property
    def capacity(self) -> Capacity:
        return self._limits.capacity

    def submit(self, id: int, request: Submit) -> None:
        if id in self._sequences:
            raise ValueError(f"sequence {id} is live already")
        seq = make_sequence(id, request, self._limits)
        if seq.startable:
            self._start(seq)
        elif seq.credit <= 0 and seq.end is None:
            self._paused[id] = seq
        else:
            self._ready[id] = seq
        self._sequences[id] = seq
        self._prompt_tokens += len(request.prompt_ids)

    def cancel(self, id: int) -> None:
        seq = self._sequences.pop(id, None)
        if seq is not None:
            self._ready.pop(id, None)
            self._paused.pop(id, None)
            self._stop(seq)

    def credit(self, id: int, tokens: int) -> None:
        seq = self._sequences.get(id)
        if seq is not None:
            seq.credit = min(seq.credit + tokens, UNLIMITED)
            if seq.credit > 0:
                self._paused.pop(id, None)
                self._ready[id] = seq

    def step(self) -> list[Emission]:
        """Read the tokens that TensorRT-LLM generated. Raises EngineFault if it makes no progress."""
        now = self._clock()
        self._preempt_paused(now)
        deltas = self._runtime.poll(0.0 if self._ready else self._poll_s)
        for delta in deltas:
            self._take_delta(delta)
        emissions = []
        for id, seq in list(self._ready.items()):
            del self._ready[id]
            if seq.can_emit:
                emissions.append(seq.emit())
            self._requeue(seq)
        self._output_tokens += sum([len(emission.tokens) for emission in emissions])
        self._watch_progress(answered=bool(deltas))
        return emissions

    def busy(self) -> bool:
        return bool(self._jobs or self._ready)

    def on_idle(self) -> None:
        """The caches belong to TensorRT-LLM: there is nothing to check."""

    def predicted_ms(self) -> float:
        return max(self._poll_s * 1000.0, self._stats.step_ms)

    def stats(self) -> EngineStats:
        """Raises :class:`EngineFault` if another rank is known to be gone, whether the engine is busy or idle."""
        self._refresh()
        stats, size = self._stats, self.capacity.block_size
        return EngineStats(
            running=len(self._jobs) - min(stats.waiting, len(self._jobs)),
            waiting=len(self._sequences) - len(self._jobs) + min(stats.waiting, len(self._jobs)),
            free_blocks=stats.free_blocks,
            prefill_tokens=sum(seq.input_len for seq in self._jobs.values() if len(seq.tokens) == seq.known_at_start),
            step_ms=stats.step_ms,
            prompt_tokens_total=self._prompt_tokens,
            output_tokens_total=self._output_tokens,
            prefix_queries_total=(stats.reused_blocks + stats.missed_blocks) * size,
            prefix_hits_total=stats.reused_blocks * size,
            preemptions_total=self._preemptions,
            prefixes=self._prefixes.hot(),
        )

    def close(self) -> None:
        self._runtime.close(CLOSE_S)

    def check(self) -> None:
        """Check that every sequence is in exactly one state. Raises AssertionError."""
        running = {seq.handle: seq for seq in self._sequences.values() if seq.handle}
        assert self._jobs == running, "a job without a sequence, or a sequence without its job"
        assert self._ready.keys() | self._paused.keys() <= self._sequences.keys(), "a queue holds a sequence that is finished"
        assert all(seq.credit <= 0 for seq in self._paused.values()), "a paused sequence has credit"
        for id, seq in self._sequences.items():
            assert seq.handle or id in self._ready or id in self._paused, "a sequence waits for nothing"
            assert seq.emitted <= len(seq.tokens), "more was emitted than is known"

    def _start(self, seq: TrtllmSequence) -> None:
        self._prefixes.expect(seq.prompt_ids + seq.tokens, seq.salt)
        if not self._jobs:
            self._progress_at = self._running.at(self._clock())
        seq.known_at_start = len(seq.tokens)
        seq.handle = self._runtime.start(seq.job())
        self._jobs[seq.handle] = seq

    def _stop(self, seq: TrtllmSequence) -> None:
        """End the job of a sequence, if one runs."""
        if seq.handle:
            del self._jobs[seq.handle]
            self._runtime.cancel(seq.handle)
            seq.handle = 0

    def _take_delta(self, delta: Delta) -> None:
        seq = self._jobs.get(delta.handle)
        if seq is None:  # cancelled before this came
            return
        seq.take(delta)
        if delta.final or delta.error:
            del self._jobs[delta.handle]
            seq.handle = 0
        elif seq.end is not None:
            self._stop(seq)
        self._ready[seq.id] = seq

    def _requeue(self, seq: TrtllmSequence) -> None:
        """Put a sequence into the right state after it has emitted all that it can."""
        if seq.end is not None and seq.emitted == len(seq.tokens):
            del self._sequences[seq.id]
        elif seq.credit <= 0:
            if seq.id not in self._paused:
                seq.paused_at = self._clock()
                self._paused[seq.id] = seq
        elif seq.startable:
            try:
                self._start(seq)
            except TriremeError as error:
                seq.fail(error)
                self._ready[seq.id] = seq

    def _preempt_paused(self, now: float) -> None:
        """Cancel the jobs of sequences that have been paused for ``PAUSE_S``: they lose their place in TensorRT-LLM's cache."""
        for seq in self._paused.values():
            if seq.handle and now - seq.paused_at >= PAUSE_S:
                self._stop(seq)
                seq.preemptions += 1
                self._preemptions += 1

    def _watch_progress(self, *, answered: bool) -> None:
        now, before = self._clock(), self._stats.iteration
        if now - self._stats_at > STATS_AGE_S:
            self._refresh()
        self._running.turn(now)
        now = self._running.at(now)
        if answered or self._stats.iteration != before or not self._jobs:
            self._progress_at = now
        elif now - self._progress_at > self._hang_s:
            raise EngineFault(
                f"TensorRT-LLM has made no iteration for {now - self._progress_at:.1f} s",
                f"{len(self._jobs)} requests wait: a rank hangs or was stopped",
                "the replica is replaced whole",
            )

    def _refresh(self) -> None:
        fresh = self._runtime.stats()
        if fresh.num_blocks:
            self._stats = fresh
        self._stats_at = self._clock()
