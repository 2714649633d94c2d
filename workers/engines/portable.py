"""The portable engine: one leader that schedules and emits, and followers that apply its plans.

The leader (rank 0) owns the :class:`~workers.scheduler.scheduler.Scheduler` and is itself the first stage's first rank; a follower owns a
runner and nothing else. A step is schedule → run → update: the leader issues plans until as many are in flight as there are stages, then
takes the oldest result. On GPUs one more plan is in flight, so that the device never waits for the host. A follower must never decide
anything, and ranks exchange only plans and results.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from workers.distributed.group import Waiter
from workers.distributed.rank_groups import split
from workers.engines.scheduled import ScheduledEngine
from workers.protocol.engine import CLOSE_S, Emission
from workers.protocol.errors import EngineFault
from workers.protocol.messages import Capacity
from workers.protocol.specs import EngineSpec, ReplicaSpec, ResumeClass
from workers.protocol.status import EngineStats
from workers.runner.bring_up import bring_up
from workers.runner.step_results import PendingResult, PlanRunner
from workers.runner.step_time import StepTimeModel
from workers.sampling.grammar_checker import compiler
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import StepPlan, StepResult, decode_plan, decode_result, encode

if TYPE_CHECKING:
    from mpi4py import MPI

    from workers.distributed.mpi_group import MpiMailbox


class MpiFollowers:
    """The leader's connection to the other ranks: plans and results each have their own communicator, so that they do not wait behind
    tensors."""

    def __init__(self, plans: MpiMailbox, results: MpiMailbox, *, world: int, tp: int) -> None:
        self._plans, self._results = plans, results
        self._ranks = range(1, world)
        self._reporting_rank = world - tp  # the last stage's first rank

    def send(self, plan: StepPlan) -> None:
        """Send ``plan`` to every other rank; returns at once."""
        data = encode(plan)
        for rank in self._ranks:
            self._plans.post(data, rank)

    def result(self) -> StepResult:
        """The oldest result not yet taken; waits for it, bounded."""
        return decode_result(self._results.take(self._reporting_rank))

    def stop(self) -> None:
        """Send a plan with ``stop``, and wait up to ``CLOSE_S`` until it is sent."""
        self.send(StepPlan(step=-1, stop=True))
        self._plans.flush(CLOSE_S)


class _IssuedPlan(msgspec.Struct, gc=False):
    """A plan in flight: its size, and its pending result if the leader is also in the last stage."""

    tokens: int
    sequences: int
    result: PendingResult | None


class PortableEngine(ScheduledEngine):
    """Implements :class:`~workers.protocol.engine.Engine` on rank 0.

    ``followers`` None = there is no other rank. With one stage the result comes from the leader's own runner; with more, from the last
    stage's first rank. ``close`` ends this rank's runner and groups.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: PlanRunner,
        capacity: Capacity,
        *,
        close: Callable[[], None],
        followers: MpiFollowers | None = None,
        resume: ResumeClass = "margin",
    ) -> None:
        super().__init__(scheduler, capacity, resume)
        self._runner, self._followers, self._close = runner, followers, close
        self._issued: deque[_IssuedPlan] = deque()
        self._step_time = StepTimeModel()
        self._updated = 0.0
        self._closed = False

    def busy(self) -> bool:
        return self._scheduler.busy(time.monotonic())

    def step(self) -> list[Emission]:
        """Issue plans until the pipeline is full, then take the oldest result. Raises EngineFault if a rank does not answer."""
        begin = time.perf_counter()
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            if self._followers is not None:
                self._followers.send(plan)
            pending = self._runner.issue(plan)
            self._issued.append(_IssuedPlan(len(plan.tokens) // 4, len(plan.slots) // 4, pending))
        if not self._issued:
            return []
        oldest = self._issued.popleft()
        if oldest.result is not None:
            result = oldest.result.result()
        elif self._followers is not None:
            result = self._followers.result()
        else:
            raise EngineFault("a lone rank that is not the last stage gets no result")
        emissions = self._scheduler.update_from_output(result)
        end = time.perf_counter()
        # In a full pipeline the cost of a step is the time between two results, not the time through all stages.
        self._step_time.observe(oldest.tokens, oldest.sequences, (end - max(begin, self._updated)) * 1e3)
        self._updated = end
        return emissions

    def predicted_ms(self) -> float:
        tokens = self._scheduler.predicted_tokens()
        return self._step_time.predict(tokens, min(tokens, self._capacity.max_batch_size))

    def stats(self) -> EngineStats:
        return self._scheduler.stats(self._step_time.last_ms)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._followers is not None:
            self._followers.stop()
        self._close()


class PortableFollower:
    """Any rank except the leader's: applies plans until one has ``stop``. ``reports_results``: results go to the leader from this rank."""

    def __init__(
        self,
        runner: PlanRunner,
        plans: MpiMailbox,
        results: MpiMailbox,
        *,
        reports_results: bool,
        waiter: Waiter,
        close: Callable[[], None],
    ) -> None:
        self._runner, self._plans, self._results, self._reports_results = runner, plans, results, reports_results
        self._waiter, self._close = waiter, close
        self._pending: deque[PendingResult] = deque()

    def run(self) -> None:
        """Apply plans; returns after a plan with ``stop``. An idle follower waits without a bound, because its process ends with its
        world."""
        while True:
            plan = self._next_plan()
            if plan.stop:
                self._results.flush(CLOSE_S)
                self._close()
                return
            pending = self._runner.issue(plan)
            if self._reports_results and pending is not None:
                self._pending.append(pending)

    def _next_plan(self) -> StepPlan:
        """The next plan; while waiting for it, send each result as soon as it is ready."""
        arrived: list[bytes] = []
        while self._pending:
            self._waiter.until(lambda: self._pending[0].ready() or self._plans.look(0, arrived))
            if arrived:
                return decode_plan(arrived[0])
            self._results.post(encode(self._pending.popleft().result()), 0)
        return decode_plan(self._plans.take(0, bound_s=None))


def _resume_class(engine: EngineSpec) -> ResumeClass:
    """With fixed shapes and one thread, the bits of a token depend only on its sequence. Several threads split the rows of a product by
    position."""
    return "bitwise" if engine.fixed_shape and engine.threads == 1 else "margin"


def build(spec: ReplicaSpec, comm: MPI.Intracomm | None) -> PortableEngine | PortableFollower:
    """Bring up this rank of ``spec``: the engine on rank 0, a follower elsewhere. ``comm`` None = a world of one.

    Raises ArtifactError, ConfigError or EnvironmentFault, on every rank the same.
    """
    ranks = split(spec, comm)
    built = bring_up(spec, ranks)
    world, tp = spec.parallel.world, spec.parallel.tp
    if comm is not None:
        from workers.distributed.mpi_group import MpiMailbox

        plans, results = MpiMailbox(comm.Dup(), spec.engine.wait), MpiMailbox(comm.Dup(), spec.engine.wait)
        if comm.Get_rank() > 0:
            reports, waiter = comm.Get_rank() == world - tp, Waiter(spec.engine.wait)
            return PortableFollower(built.runner, plans, results, reports_results=reports, waiter=waiter, close=built.close)
        followers: MpiFollowers | None = MpiFollowers(plans, results, world=world, tp=tp)
    else:
        followers = None
    artifact = built.artifact
    folder = Path(spec.tokenizer) if spec.tokenizer else artifact.tokenizer_dir
    guides = None if folder is None else compiler(folder / "tokenizer.json", artifact.model.vocab_size, artifact.eos_ids)
    capacity = msgspec.structs.replace(built.capacity, guided=guides is not None)
    scheduler = Scheduler(
        capacity,
        guides=guides,
        micro_batches=spec.parallel.pp,
        async_scheduling=spec.engine.device == "cuda",
        eos_ids=artifact.eos_ids,
    )
    return PortableEngine(scheduler, built.runner, capacity, close=built.close, followers=followers, resume=_resume_class(spec.engine))
