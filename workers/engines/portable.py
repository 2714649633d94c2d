"""The portable engine: one leader that batches and answers, and followers that apply its plans.

The leader (rank 0) owns the :class:`~workers.scheduler.scheduler.Scheduler` and is itself the first stage's first rank; a follower owns a
runner and nothing else. A step is plan → run → commit: the leader issues plans until as many are in flight as there are stages, then
commits the oldest. On GPUs one plan more is in flight, so that the device never waits for the host. Must never let a follower decide, nor
send anything but plans and results between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from workers.distributed.group import Waiter
from workers.distributed.rank_groups import split
from workers.protocol.engine import Emission, EngineStats
from workers.protocol.errors import EngineFault
from workers.protocol.messages import Capacity, Submit
from workers.protocol.specs import EngineSpec, ReplicaSpec, ResumeClass
from workers.runner.bring_up import bring_up
from workers.runner.step_results import PendingResult, PlanRunner
from workers.runner.step_time import StepTimeModel
from workers.sampling.grammar_checker import compiler
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import StepPlan, StepResult, decode_plan, decode_result, encode

if TYPE_CHECKING:
    from mpi4py import MPI

    from workers.distributed.mpi_group import MpiMailbox

#: Bound of closing, seconds.
CLOSE_S = 5.0


class RankExecutor(Protocol):
    """How the leader reaches the other ranks."""

    def tell(self, plan: StepPlan) -> None:
        """Send ``plan`` to every other rank; returns at once."""

    def answer(self) -> StepResult:
        """The oldest result not yet taken; waits for it, bounded."""

    def dismiss(self, plan: StepPlan) -> None:
        """Send the last plan, and see it leave within ``CLOSE_S``."""


class MpiExecutor:
    """Plans and results over two communicators of their own, so that neither waits behind tensors."""

    def __init__(self, plans: MpiMailbox, results: MpiMailbox, *, world: int, tp: int) -> None:
        self._plans, self._results = plans, results
        self._others = range(1, world)
        self._source = world - tp

    def tell(self, plan: StepPlan) -> None:
        data = encode(plan)
        for rank in self._others:
            self._plans.post(data, rank)

    def answer(self) -> StepResult:
        return decode_result(self._results.take(self._source))

    def dismiss(self, plan: StepPlan) -> None:
        self.tell(plan)
        self._plans.flush(CLOSE_S)


class _Out(msgspec.Struct, gc=False):
    """A plan in flight: its size, and its answer where the leader is the last stage too."""

    tokens: int
    rows: int
    answer: PendingResult | None


class PortableEngine:
    """Implements :class:`~workers.protocol.engine.Engine` on rank 0.

    ``crew`` None = this rank is alone. With one stage the leader's own runner answers; with more, the last stage's first rank does.
    ``close``: how this rank goes down.
    """

    def __init__(
        self,
        batch: Scheduler,
        runner: PlanRunner,
        capacity: Capacity,
        *,
        close: Callable[[], None],
        crew: RankExecutor | None = None,
        resume: ResumeClass = "margin",
    ) -> None:
        self._scheduler, self._runner, self._capacity, self._crew, self._resume = batch, runner, capacity, crew, resume
        self._close = close
        self._out: deque[_Out] = deque()
        self._pace = StepTimeModel()
        self._committed = 0.0
        self._closed = False

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def resume(self) -> ResumeClass:
        return self._resume

    def submit(self, id: int, request: Submit) -> None:
        self._scheduler.submit(id, request)

    def cancel(self, id: int) -> None:
        self._scheduler.cancel(id)

    def credit(self, id: int, tokens: int) -> None:
        self._scheduler.credit(id, tokens)

    def busy(self) -> bool:
        return self._scheduler.busy(time.monotonic())

    def step(self) -> list[Emission]:
        """Issue plans until the pipeline is full, then commit the oldest. Raises EngineFault when a rank does not answer."""
        begin = time.perf_counter()
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            if self._crew is not None:
                self._crew.tell(plan)
            answer = self._runner.issue(plan)
            self._out.append(_Out(len(plan.tokens) // 4, len(plan.slots) // 4, answer))
        if not self._out:
            return []
        oldest = self._out.popleft()
        if oldest.answer is not None:
            result = oldest.answer.result()
        elif self._crew is not None:
            result = self._crew.answer()
        else:
            raise EngineFault("a lone rank that is not the last stage has nobody to answer it")
        emissions = self._scheduler.update_from_output(result)
        end = time.perf_counter()
        # In a full pipeline a step's cost is the time between commits, not its way through all stages.
        self._pace.observe(oldest.tokens, oldest.rows, (end - max(begin, self._committed)) * 1e3)
        self._committed = end
        return emissions

    def on_idle(self) -> None:
        self._scheduler.on_idle()

    def predicted_ms(self) -> float:
        tokens = self._scheduler.predicted_tokens()
        return self._pace.predict(tokens, min(tokens, self._capacity.max_batch_size))

    def stats(self) -> EngineStats:
        return self._scheduler.stats(self._pace.last_ms)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._crew is not None:
            self._crew.dismiss(StepPlan(step=-1, stop=True))
        self._close()


class PortableFollower:
    """Any rank but the leader's: applies plans until one says stop, and answers them if ``results`` go to the leader from here."""

    def __init__(
        self, runner: PlanRunner, plans: MpiMailbox, results: MpiMailbox, *, answers: bool, waiter: Waiter, close: Callable[[], None]
    ) -> None:
        self._runner, self._plans, self._results, self._answers = runner, plans, results, answers
        self._waiter, self._close = waiter, close
        self._out: deque[PendingResult] = deque()

    def run(self) -> None:
        """Returns after a plan with ``stop``. An idle follower waits without a bound: the end of its world is the end of its process."""
        while True:
            plan = self._next()
            if plan.stop:
                self._results.flush(CLOSE_S)
                self._close()
                return
            answer = self._runner.issue(plan)
            if self._answers and answer is not None:
                self._out.append(answer)

    def _next(self) -> StepPlan:
        """The next plan; answers go out meanwhile, each as soon as it is there."""
        arrived: list[bytes] = []
        while self._out:
            self._waiter.until(lambda: self._out[0].ready() or self._plans.look(0, arrived))
            if arrived:
                return decode_plan(arrived[0])
            self._results.post(encode(self._out.popleft().result()), 0)
        return decode_plan(self._plans.take(0, bound_s=None))


def _resume_class(engine: EngineSpec) -> ResumeClass:
    """Fixed shapes make a token's bits depend on its row alone, on one thread: several share out a product's rows by their place."""
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
            answers = comm.Get_rank() == world - tp
            return PortableFollower(built.runner, plans, results, answers=answers, waiter=Waiter(spec.engine.wait), close=built.close)
        crew: RankExecutor | None = MpiExecutor(plans, results, world=world, tp=tp)
    else:
        crew = None
    artifact, folder = built.artifact, built.artifact.tokenizer_dir
    guides = None if folder is None else compiler(folder / "tokenizer.json", artifact.model.vocab_size, artifact.eos_ids)
    capacity = msgspec.structs.replace(built.capacity, guided=guides is not None)
    batch = Scheduler(
        capacity,
        guides=guides,
        micro_batches=spec.parallel.pp,
        async_scheduling=spec.engine.device == "cuda",
        eos_ids=artifact.eos_ids,
    )
    return PortableEngine(batch, built.runner, capacity, close=built.close, crew=crew, resume=_resume_class(spec.engine))
