"""In-flight batching: the pure state machine that turns requests into step plans and step results into emissions.

Owns every live row, its place, its slot and its blocks. Must never run a model, read a clock, or look at text: time is an argument, tokens
are integers. A request is only "computed < known"; prefill, chunk, prefix hit, resume after failover and decode are one case.

    submit ──► waiting ──admit──► prefills | decodes ──plan──► in flight ──commit──► prefills | decodes | paused | over
                  ▲                        │
                  └────────preempt─────────┘
    paused ──credit──► where it was, or waiting if it gave up its K/V meanwhile

At most ``micro_batches`` plans are in flight over disjoint rows; results are committed in the order of the plans. A driver calls
:meth:`Scheduler.plan` until it answers None, runs, then commits the oldest. Each plan takes its share of the rows: a pipeline stays
balanced.

With ``ahead`` one plan more is in flight, over rows of the oldest one: each goes on from a token that only the device knows yet (a *guess*,
-1 in the plan). What ends a row is then seen one step late: its second plan's answer is dropped, and its blocks are free only after that.
Most plans are the one before once more, a token further (:meth:`Scheduler._again`): the host pays for every step of every row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from workers.protocol.engine import Emission, EngineStats, Fault, Finish
from workers.protocol.errors import EngineFault
from workers.protocol.messages import STEP_TOKEN_BUCKETS, UNLIMITED, Capacity, Submit
from workers.sampling.guide import GuideFactory
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.in_flight import InFlightStep, StepDraft
from workers.scheduler.invariants import prove
from workers.scheduler.sequence import NEVER, Queue, Sequence, make_row
from workers.scheduler.step_plan import I32, StepPlan, StepResult, view

#: Seconds without credit after which a row gives up its K/V.
PAUSE_S = 2.0
#: Steps between two proofs of an idle batch: one takes 0.3 s where 200,000 blocks are findable.
CHECK_STEPS = 256


def _admission_order(row: Sequence) -> int:
    return row.order


class Scheduler:
    """Rows of one replica.

    Args:
        limits: what the engine can hold: blocks, ``max_batch_size`` rows with a slot, ``max_num_tokens`` a step, context, vocabulary;
            and whether rows reuse blocks by content.
        guides: compiles a row's grammar; None = guided rows are refused.
        micro_batches: plans that may be in flight, at least the number of pipeline stages.
        ahead: whether one plan more may be in flight, over rows whose last token is still being sampled.
        eos_ids: end-of-sequence ids of the model.
    """

    def __init__(
        self,
        limits: Capacity,
        *,
        guides: GuideFactory | None = None,
        micro_batches: int = 1,
        ahead: bool = False,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._limits = limits
        self._guides = guides
        self._micro_batches = micro_batches
        self._ahead = ahead
        self._eos_ids = frozenset(eos_ids)
        self._pool = BlockPool(limits.num_blocks, limits.block_size, findable=limits.prefix_cache)
        self._rows: dict[int, Sequence] = {}
        self._waiting: Queue = deque()  # no slot; in admission order
        self._prefills: Queue = deque()  # slot, a prompt to compute; in admission order
        self._decodes: Queue = deque()  # slot, one token pending that yields the next; longest unserved first
        self._paused: Queue = deque()  # no credit; with or without a slot
        self._flights: deque[InFlightStep] = deque()
        self._slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._closed: list[int] = []
        self._refused: tuple[int, int, int] | None = None
        self._tight = False  # the last plan lacked blocks for a row
        self._left = 0  # rows that are over by now
        self._now = 0.0
        self._orders = 0
        self._steps = self._checked = 0
        self._prompt_tokens = self._output_tokens = self._queried = self._hit = self._preemptions = 0
        self._step_tokens, self._step_tokens_total = [0] * (len(STEP_TOKEN_BUCKETS) + 1), 0

    # Commands

    def submit(self, id: int, request: Submit) -> None:
        """Queue a row. Raises TooLong, Rejected or Unsupported and then holds nothing; ``id`` must not be live."""
        if id in self._rows:
            raise ValueError(f"row {id} is live already")
        row = make_row(id, self._orders, request, self._limits, self._eos_ids, self._guides)
        self._orders += 1
        self._rows[id] = row
        self._place(row)

    def cancel(self, id: int) -> None:
        """Forget a row; its blocks are free at once, or after the step in flight that may still write them. Unknown ids are ignored."""
        row = self._rows.pop(id, None)
        if row is None:
            return
        self._leave(row)

    def credit(self, id: int, tokens: int) -> None:
        """Allow ``tokens`` more to be emitted. Unknown ids are ignored."""
        row = self._rows.get(id)
        if row is None:
            return
        row.allow(min(row.credit + tokens, UNLIMITED))
        if row.home is self._paused and row.credit > 0:
            self._paused.remove(row)
            self._place(row)

    # Facts

    def busy(self, now: float = 0.0) -> bool:
        """Whether a plan is in flight or :meth:`plan` would do something: rows run or wait, or a paused row's time with its K/V is up."""
        return bool(self._flights or self._decodes or self._prefills or self._waiting) or any(self._overdue(max(now, self._now)))

    @property
    def in_flight(self) -> int:
        """Plans issued and not committed."""
        return len(self._flights)

    def predicted_tokens(self) -> int:
        """Tokens of the next plan, at most: what a cost model needs."""
        total = len(self._decodes)
        for row in chain(self._prefills, self._waiting):
            if total >= self._limits.max_num_tokens:
                break
            total += row.pending
        return min(total, self._limits.max_num_tokens)

    def stats(self, step_ms: float = 0.0) -> EngineStats:
        """Counts now and totals; ``running`` rows have a slot, ``waiting`` ones want one (without credit they do not). Prefix queries and
        hits are counted in tokens."""
        return EngineStats(
            steps_total=self._steps,
            running=sum(row.slot >= 0 for row in self._rows.values()),
            waiting=len(self._waiting),
            free_blocks=self._pool.available,
            num_blocks=self._pool.num_blocks,
            prefill_tokens=sum(row.pending for row in chain(self._prefills, self._waiting)),
            step_ms=step_ms,
            prompt_tokens_total=self._prompt_tokens,
            output_tokens_total=self._output_tokens,
            prefix_queries_total=self._queried,
            prefix_hits_total=self._hit,
            preemptions_total=self._preemptions,
            step_tokens=self._step_tokens.copy(),
            step_tokens_total=self._step_tokens_total,
        )

    # Plan

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step's plan, or None when enough are out or no row can run. ``now``: seconds on any steady clock."""
        self._now = max(now, self._now)
        if len(self._flights) >= self._micro_batches:
            if not self._ahead or len(self._flights) > self._micro_batches:
                return None
            if not self._tight:  # rows in flight cannot be preempted: where blocks are short, let them land first
                if (again := self._again(self._flights[0])) is not None:
                    return again
                self._settle()
                self._go_on(self._flights[0])
        for row in list(self._overdue(self._now)):
            self._preempt(row)
        draft = self._draft()
        if not draft.rows and self._waiting and not self._flights:
            # Only paused rows hold what the first waiting row lacks, and nobody else will give anything back.
            for row in [row for row in self._paused if row.slot >= 0]:
                self._preempt(row)
            draft = self._draft()
        return self._issue(draft) if draft.rows else None

    def _again(self, flight: InFlightStep) -> StepPlan | None:
        """The plan of ``flight`` one token further, where all its rows surely go on, nobody else can have a place, and there are blocks."""
        if flight.sure <= 0 or flight.over != self._left or self._decodes or self._prefills or (self._waiting and self._slots):
            return None
        if any(self._overdue(self._now)):
            return None
        full = flight.full()
        fresh = self._pool.allocate(len(full))
        if fresh is None:
            return None
        for row, block in zip(full, fresh, strict=True):
            row.blocks.append(block)
            row.room += self._pool.block_size
        return self._send_off(flight.again(self._steps + 1, self._closed, fresh, self._pool.block_size))

    def _draft(self) -> StepDraft:
        """Choose the next plan's rows: decodes, then prefill chunks, then admissions, under the token budget and this plan's share."""
        draft = StepDraft()
        decodes, rows = self._decodes, draft.rows
        budget = self._limits.max_num_tokens
        paused = sum(row.slot >= 0 for row in self._paused)
        active = min(self._running - paused + len(self._waiting), self._limits.max_batch_size)
        share = -(-active // self._micro_batches)
        free = min(share, budget)
        while decodes and free:
            row = decodes.popleft()
            row.home = None
            if row.issued == row.room and not self._grow(row, draft):
                continue
            rows.append(row)
            free -= 1
        for row in reversed(draft.stuck):
            row.home = decodes
            decodes.appendleft(row)
        self._tight = bool(draft.stuck)
        draft.decodes = len(rows)
        draft.counts = [1] * draft.decodes
        budget -= draft.decodes
        while budget and len(draft.rows) < share and (next_row := self._next_prefill(draft)) is not None:
            next_row.home = None
            draft.rows.append(next_row)
            draft.counts.append(min(next_row.pending, budget))
            budget -= draft.counts[-1]
        return draft

    def _grow(self, row: Sequence, draft: StepDraft) -> bool:
        """Add a block to a decoding row, at the cost of the youngest row if need be (which may be this one). False: not in this plan."""
        while (fresh := self._pool.allocate(1)) is None:
            victim = self._victim()
            if victim is None:  # all other blocks belong to rows of this plan or in flight: try again after them
                draft.stuck.append(row)
                return False
            if victim.home is not self._paused and victim.order < row.order:
                victim = row
            self._preempt(victim)
            if victim is row:
                return False
        row.blocks += fresh
        row.room += self._pool.block_size
        draft.grown.append(row)
        return True

    def _victim(self) -> Sequence | None:
        """The row to give up its blocks: the youngest paused one, else the youngest that is not in flight nor in the plan being made."""
        holders = [row for row in self._paused if row.slot >= 0]
        if not holders:
            holders = [row for row in chain(self._decodes, self._prefills) if not row.airborne]
        return max(holders, key=_admission_order, default=None)

    def _next_prefill(self, draft: StepDraft) -> Sequence | None:
        """Take the oldest row that has a slot and a prompt to compute, else admit the oldest waiting one."""
        if self._prefills:
            return self._prefills.popleft()
        if self._waiting and self._slots and self._open(self._waiting[0]):
            row = self._waiting.popleft()
            draft.opened.append(row)
            return row
        return None

    def _open(self, row: Sequence) -> bool:
        """Give a waiting row a slot, the blocks found for its prefix, and fresh ones for all else that is known of it."""
        state = (row.id, self._pool.available, self._running)
        if state == self._refused:
            return False
        size = self._pool.block_size
        found: list[int] = []
        if row.prompt_scores is None and self._pool.findable:
            found = self._pool.match(row.findable_hashes(size), row.tokens, row.salt)
        self._pool.hold(found)
        need = -(-row.known // size) - len(found)
        # One block in reserve for each running row: a newcomer should not be preempted by the next block that an elder needs.
        fresh = self._pool.allocate(need) if need + self._running <= self._pool.available else None
        if fresh is None:
            self._pool.release(found)
            self._refused = state
            return False
        row.slot = self._slots.pop()
        row.blocks = found + fresh
        row.room = len(row.blocks) * size
        row.computed = row.issued = len(found) * size
        row.publish_at = row.computed + size if self._pool.findable else NEVER
        row.opened = row.known
        row.settle()
        if row.cached_tokens < 0:
            row.cached_tokens = min(row.computed, row.prompt_len)
            self._prompt_tokens += row.prompt_len
            self._queried += row.prompt_len
            self._hit += row.cached_tokens
        return True

    def _issue(self, draft: StepDraft) -> StepPlan:
        """Turn a draft into the plan."""
        flight = draft.issue(self._steps + 1, self._closed)
        # The rows of the plan that they go on from, and nobody else: so it may stay for a while.
        if self._ahead and draft.decodes == len(draft.rows) and self._flights and self._flights[0].rows == draft.rows:
            flight.sure, flight.over = min([row.ahead - len(row.tokens) for row in draft.rows]) - 1, self._left
        return self._send_off(flight)

    def _send_off(self, flight: InFlightStep) -> StepPlan:
        """Remember a plan as in flight."""
        self._steps += 1
        tokens = len(flight.plan.tokens) // I32.itemsize
        self._step_tokens[bisect_left(STEP_TOKEN_BUCKETS, tokens)] += 1
        self._step_tokens_total += tokens
        self._closed = []
        self._flights.append(flight)
        return flight.plan

    def _settle(self) -> None:
        """Let every row know what is in flight of it."""
        for flight in self._flights:
            flight.settle()

    def _go_on(self, flight: InFlightStep) -> None:
        """Let the rows of ``flight`` be planned again before its answer is there: chunks go on, and tokens are guessed."""
        if flight.left:
            return
        flight.left = True
        decodes = self._decodes
        for row, sampled in zip(flight.rows, flight.samples, strict=True):
            if row.over:
                continue
            if sampled:
                # A stop token ends it one step late.
                if len(row.tokens) < row.ahead:
                    row.home = decodes
                    decodes.append(row)
            elif row.pending:
                self._place(row)

    # Commit

    def commit(self, result: StepResult) -> list[Emission]:
        """Take the answer to the oldest plan in flight. Raises EngineFault when ``result`` answers another one."""
        if not self._flights or self._flights[0].plan.step != result.step:
            expected = self._flights[0].plan.step if self._flights else None
            raise EngineFault("a step's result came out of order", f"expected step {expected}, got {result.step}")
        flight = self._flights.popleft()
        chosen = view(result.tokens).tolist()
        if not result.logprobs and flight.over == self._left and (landed := flight.land(chosen)) is not None:
            self._output_tokens += len(landed)
            return landed
        flight.settle()
        if len(chosen) < len(flight.rows):  # None for the rows that only computed a chunk
            answers = iter(chosen)
            chosen = [next(answers) if sampled else None for sampled in flight.samples]
        scored = flight.logprobs(chosen, result) if result.logprobs else [None] * len(flight.rows)
        landing = flight.next is None
        for i, *answer in result.prompt:
            if not flight.rows[i].over:
                flight.rows[i].score(*answer)
        emissions: list[Emission] = []
        silent = 0  # emissions without a token: only an end can be one
        for row, count, token, logprobs in zip(flight.rows, flight.counts, chosen, scored, strict=True):
            row.computed = computed = row.computed + count
            if computed < row.calm and token not in row.ends and logprobs is None:  # most tokens; all that is computed is known
                row.tokens.append(token)
                emissions.append(Emission(row.id, computed - row.prompt_len, [token]))
                if landing and computed == row.issued and row.home is None:
                    self._place(row)
                continue
            if row.over:  # it ended, or was cancelled, while in flight; only now can nothing write its blocks any more
                if computed == row.issued:
                    self._vacate(row)
                continue
            if computed >= row.publish_at:
                row.publish(self._pool)
            gone_on = not landing or computed < row.issued or row.home is not None
            if token is not None:
                emission = row.accept(token, logprobs)
            elif computed == row.known:
                emission = row.expire()
            else:
                if not gone_on:
                    self._place(row)
                continue
            emissions.append(emission)
            if emission.end is not None:
                silent += not emission.tokens
                self._end(row, emission.end)
            elif not gone_on:
                self._place(row)
        self._output_tokens += len(emissions) - silent
        return emissions

    # Places

    def _place(self, row: Sequence) -> None:
        """Put a row that is not in flight into the queue where it belongs."""
        if row.credit <= 0:
            row.home = self._paused
            row.paused_at = self._now
        elif row.slot >= 0 and row.pending == 1 and not row.spent:
            row.home = self._decodes
        else:
            row.home = self._waiting if row.slot < 0 else self._prefills
            insort(row.home, row, key=_admission_order)
            return
        row.home.append(row)

    def _preempt(self, row: Sequence) -> None:
        """Take slot and blocks from a row that is not in flight; all that is known of it is computed again later."""
        if row.home is not None:
            row.home.remove(row)
        self._vacate(row)
        self._preemptions += 1
        row.restart()
        self._place(row)

    def _vacate(self, row: Sequence) -> None:
        """Free a row's slot and blocks; ranks are told with the next plan."""
        if row.slot < 0:
            return
        row.publish(self._pool)
        self._pool.release(row.blocks)
        self._slots.append(row.slot)
        self._closed.append(row.slot)
        row.slot, row.blocks = -1, []

    def _end(self, row: Sequence, end: Finish | Fault) -> None:
        if isinstance(end, Fault):
            self._pool.forget(row.blocks)  # whatever broke this row must not spread through the prefix cache
            row.publish_at = NEVER
        del self._rows[row.id]
        self._leave(row)

    def _leave(self, row: Sequence) -> None:
        """A row is over. Its blocks are free now, or after the last plan in flight that may still write them."""
        self._settle()
        row.over = True
        row.settle()
        self._left += 1
        if row.home is not None:
            row.home.remove(row)
            row.home = None
        if not row.airborne:
            self._vacate(row)

    def _overdue(self, now: float) -> Iterator[Sequence]:
        return (row for row in self._paused if row.slot >= 0 and now - row.paused_at >= PAUSE_S)

    @property
    def _running(self) -> int:
        """Slots taken."""
        return self._limits.max_batch_size - len(self._slots)

    # Proof

    def rest(self) -> None:
        """:meth:`check`, if there is nothing to do and ``CHECK_STEPS`` have passed since the last time."""
        if self._steps - self._checked >= CHECK_STEPS and not self.busy():
            self._checked = self._steps
            self.check()

    def check(self) -> None:
        """Prove the invariants of rows, queues, slots and blocks. Raises AssertionError naming the first one broken."""
        self._settle()
        prove(
            self._rows,
            self._flights,
            self._pool,
            waiting=self._waiting,
            prefills=self._prefills,
            decodes=self._decodes,
            paused=self._paused,
            slots=self._slots,
            slot_count=self._limits.max_batch_size,
        )
