"""In-flight batching: the pure state machine that turns requests into step plans and step results into emissions.

Owns every live row, its place, its slot and its blocks. Must never run a model, read a clock, or look at text: time is an argument, tokens
are integers. A request is only "computed < known"; prefill, chunk, prefix hit, resume after failover and decode are one case.

    submit ──► waiting ──admit──► prefills | decodes ──plan──► in flight ──commit──► prefills | decodes | paused | over
                  ▲                        │
                  └────────preempt─────────┘
    paused ──credit──► where it was, or waiting if it gave up its K/V meanwhile

At most ``micro_batches`` plans are in flight over disjoint rows; results are committed in the order of the plans. A driver calls
:meth:`Batch.plan` until it answers None, runs, then commits the oldest. Each plan takes its share of the rows: a pipeline stays balanced.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from workers.core.blocks import BlockPool
from workers.core.contract import Emission, EngineStats, Fault, Finish
from workers.core.guide import GuideFactory
from workers.core.plan import StepPlan, StepResult, column, view
from workers.core.rows import NEVER, Draft, Flight, Queue, Row, make_row
from workers.errors import EngineFault
from workers.wire import UNLIMITED, Capacity, Submit

#: Seconds without credit after which a row gives up its K/V.
PAUSE_S = 2.0
#: Steps between two proofs that an engine makes when idle: one takes as long as a few steps where the pool is full.
CHECK_STEPS = 256


def _admission_order(row: Row) -> int:
    return row.order


class Batch:
    """Rows of one replica.

    Args:
        limits: what the engine can hold: blocks, ``max_batch_size`` rows with a slot, ``max_num_tokens`` a step, context, vocabulary.
        guides: compiles a row's grammar; None = guided rows are refused.
        micro_batches: plans that may be in flight, at least the number of pipeline stages.
        eos_ids: end-of-sequence ids of the model.
        prefix_cache: whether rows reuse blocks by content.
    """

    def __init__(
        self,
        limits: Capacity,
        *,
        guides: GuideFactory | None = None,
        micro_batches: int = 1,
        eos_ids: Iterable[int] = (),
        prefix_cache: bool = True,
    ) -> None:
        self._limits = limits
        self._guides = guides
        self._micro_batches = micro_batches
        self._eos_ids = frozenset(eos_ids)
        self._pool = BlockPool(limits.num_blocks, limits.block_size, findable=prefix_cache)
        self._rows: dict[int, Row] = {}
        self._waiting: Queue = deque()  # no slot; in admission order
        self._prefills: Queue = deque()  # slot, a prompt to compute; in admission order
        self._decodes: Queue = deque()  # slot, one token pending that yields the next; longest unserved first
        self._paused: Queue = deque()  # no credit; with or without a slot
        self._flights: deque[Flight] = deque()
        self._slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._closed: list[int] = []
        self._refused: tuple[int, int, int] | None = None
        self._now = 0.0
        self._orders = 0
        self._steps = 0
        self._prompt_tokens = self._output_tokens = self._queried = self._hit = self._preemptions = 0

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
        row.over = True
        if row.home is not None:
            row.home.remove(row)
            row.home = None
            self._vacate(row)

    def credit(self, id: int, tokens: int) -> None:
        """Allow ``tokens`` more to be emitted. Unknown ids are ignored."""
        row = self._rows.get(id)
        if row is None:
            return
        row.credit = min(row.credit + tokens, UNLIMITED)
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
        """Counts now and totals; ``running`` rows have a slot. Prefix queries and hits are counted in tokens."""
        waiting = sum(row.slot < 0 for row in self._rows.values())
        return EngineStats(
            steps_total=self._steps,
            running=len(self._rows) - waiting,
            waiting=waiting,
            free_blocks=self._pool.available,
            num_blocks=self._pool.num_blocks,
            prefill_tokens=sum(row.pending for row in chain(self._prefills, self._waiting)),
            step_ms=step_ms,
            prompt_tokens_total=self._prompt_tokens,
            output_tokens_total=self._output_tokens,
            prefix_queries_total=self._queried,
            prefix_hits_total=self._hit,
            preemptions_total=self._preemptions,
        )

    # Plan

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step's plan, or None when ``micro_batches`` are out or no row can run. ``now``: seconds on any steady clock."""
        self._now = max(now, self._now)
        if len(self._flights) >= self._micro_batches:
            return None
        for row in list(self._overdue(self._now)):
            self._preempt(row)
        draft = self._draft()
        if not draft.rows and self._waiting and not self._flights:
            # Only paused rows hold what the first waiting row lacks, and nobody else will give anything back.
            for row in [row for row in self._paused if row.slot >= 0]:
                self._preempt(row)
            draft = self._draft()
        return self._issue(draft) if draft.rows else None

    def _draft(self) -> Draft:
        """Choose the next plan's rows: decodes, then prefill chunks, then admissions, under the token budget and this plan's share."""
        draft = Draft()
        budget = self._limits.max_num_tokens
        paused = sum(row.slot >= 0 for row in self._paused)
        active = min(self._running - paused + len(self._waiting), self._limits.max_batch_size)
        share = -(-active // self._micro_batches)
        limit = min(share, budget)
        while self._decodes and len(draft.rows) < limit:
            row = self._decodes.popleft()
            row.home = None
            if row.computed == row.room and not self._grow(row, draft):
                continue
            draft.rows.append(row)
        for row in reversed(draft.stuck):
            row.home = self._decodes
            self._decodes.appendleft(row)
        draft.decodes = len(draft.rows)
        draft.counts = [1] * draft.decodes
        budget -= draft.decodes
        while budget and len(draft.rows) < share and (next_row := self._next_prefill(draft)) is not None:
            next_row.home = None
            draft.rows.append(next_row)
            draft.counts.append(min(next_row.pending, budget))
            budget -= draft.counts[-1]
        return draft

    def _grow(self, row: Row, draft: Draft) -> bool:
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

    def _victim(self) -> Row | None:
        """The row to give up its blocks: the youngest paused one, else the youngest that is not in flight nor in the plan being made."""
        holders = [row for row in self._paused if row.slot >= 0] or chain(self._decodes, self._prefills)
        return max(holders, key=_admission_order, default=None)

    def _next_prefill(self, draft: Draft) -> Row | None:
        """Take the oldest row that has a slot and a prompt to compute, else admit the oldest waiting one."""
        if self._prefills:
            return self._prefills.popleft()
        if self._waiting and self._slots and self._open(self._waiting[0]):
            row = self._waiting.popleft()
            draft.opened.append(row)
            return row
        return None

    def _open(self, row: Row) -> bool:
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
        row.computed = len(found) * size
        row.publish_at = row.computed + size if self._pool.findable else NEVER
        if row.cached_tokens < 0:
            row.cached_tokens = min(row.computed, row.prompt_len)
            self._prompt_tokens += row.prompt_len
            self._queried += row.prompt_len
            self._hit += row.cached_tokens
        return True

    def _issue(self, draft: Draft) -> StepPlan:
        """Turn a draft into the plan and remember it as in flight."""
        rows, counts, decodes = draft.rows, draft.counts, draft.decodes
        starts = [row.computed for row in rows]
        tokens = [row.tokens[-1] for row in rows[:decodes]]
        samples = [1] * decodes
        for row, count in zip(rows[decodes:], counts[decodes:], strict=True):
            tokens += row.tokens[row.computed : row.computed + count]
            samples.append(int(count == row.pending and not row.spent))
        scores = [0] * decodes + [int(row.wants_score()) for row in rows[decodes:]]
        added = [(row.slot, row.blocks) for row in draft.opened] + [(row.slot, row.blocks[-1:]) for row in draft.grown]
        self._steps += 1
        plan = StepPlan(
            step=self._steps,
            slots=column([row.slot for row in rows]),
            starts=column(starts),
            lengths=column(counts),
            tokens=column(tokens),
            sample=column(samples),
            score=column(scores) if any(scores) else b"",
            block_slots=column([slot for slot, blocks in added for _ in blocks]),
            block_ids=column([block for _, blocks in added for block in blocks]),
            closed=column(self._closed),
            opened=[row.opening() for row in draft.opened],
            masks=[(i, row.guide.mask()) for i, row in enumerate(rows) if row.guide is not None and samples[i]],
        )
        self._closed = []
        self._flights.append(Flight(self._steps, rows, counts, samples))
        return plan

    # Commit

    def commit(self, result: StepResult) -> list[Emission]:
        """Take the answer to the oldest plan in flight. Raises EngineFault when ``result`` answers another one."""
        if not self._flights or self._flights[0].step != result.step:
            expected = self._flights[0].step if self._flights else None
            raise EngineFault("a step's result came out of order", f"expected step {expected}, got {result.step}")
        flight = self._flights.popleft()
        chosen = view(result.tokens).tolist()
        if len(chosen) < len(flight.rows):  # None for the rows that only computed a chunk
            answers = iter(chosen)
            chosen = [next(answers) if sampled else None for sampled in flight.samples]
        scored = flight.logprobs(chosen, result) if result.logprobs else None
        prompts = {i: (own, ids, logprobs) for i, own, ids, logprobs in result.prompt}
        emissions: list[Emission] = []
        for i, (row, count, token) in enumerate(zip(flight.rows, flight.counts, chosen, strict=True)):
            if row.over:  # cancelled while in flight; only now can nothing write its blocks any more
                self._vacate(row)
                continue
            if prompts and i in prompts:
                row.score(row.computed, prompts[i])
            row.computed += count
            if row.computed >= row.publish_at:
                row.publish(self._pool)
            if token is not None:
                emission = row.accept(token, scored[i] if scored is not None else None)
            elif row.computed == row.known:
                emission = row.expire()
            else:
                self._place(row)
                continue
            emissions.append(emission)
            if emission.end is not None:
                self._end(row, emission.end)
            elif row.credit > 0:
                row.home = self._decodes
                self._decodes.append(row)
            else:
                self._place(row)
        self._output_tokens += sum([len(emission.tokens) for emission in emissions])
        return emissions

    # Places

    def _place(self, row: Row) -> None:
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

    def _preempt(self, row: Row) -> None:
        """Take slot and blocks from a row that is not in flight; all that is known of it is computed again later."""
        if row.home is not None:
            row.home.remove(row)
        self._vacate(row)
        self._preemptions += 1
        row.restart()
        self._place(row)

    def _vacate(self, row: Row) -> None:
        """Free a row's slot and blocks; ranks are told with the next plan."""
        if row.slot < 0:
            return
        self._pool.release(row.blocks)
        self._slots.append(row.slot)
        self._closed.append(row.slot)
        row.slot, row.blocks = -1, []

    def _end(self, row: Row, end: Finish | Fault) -> None:
        if isinstance(end, Fault):
            self._pool.forget(row.blocks)  # whatever broke this row must not spread through the prefix cache
        row.over = True
        del self._rows[row.id]
        self._vacate(row)

    def _overdue(self, now: float) -> Iterator[Row]:
        return (row for row in self._paused if row.slot >= 0 and now - row.paused_at >= PAUSE_S)

    @property
    def _running(self) -> int:
        """Slots taken."""
        return self._limits.max_batch_size - len(self._slots)

    # Proof

    def check(self) -> None:
        """Prove the invariants of rows, queues, slots and blocks. Raises AssertionError naming the first one broken."""
        flying = [row for flight in self._flights for row in flight.rows]
        queued = [row for queue in (self._waiting, self._prefills, self._decodes, self._paused) for row in queue]
        everyone = flying + queued
        assert len({id(row) for row in everyone}) == len(everyone), "a row is in two places"
        assert {row.id for row in everyone if not row.over} == self._rows.keys(), "a live row is in no place"
        assert not any(row.over for row in queued), "a row that is over waits for something"
        assert all(row.home is None for row in flying), "a row in flight can be chosen again"
        assert all(row.slot < 0 and row.credit > 0 for row in self._waiting), "a waiting row has a slot or no credit"
        assert all(row.slot >= 0 and row.pending == 1 and row.credit > 0 for row in self._decodes), "a decoding row is not ready"
        assert not any(row.spent for row in self._decodes), "a row with nothing to emit decodes"
        assert all(row.slot >= 0 and row.credit > 0 for row in self._prefills), "a prefilling row is not ready"
        assert all(row.credit <= 0 for row in self._paused), "a paused row has credit"
        for queue in (self._waiting, self._prefills):
            assert [row.order for row in queue] == sorted(row.order for row in queue), "a queue is out of admission order"
        for row in everyone:
            assert 0 <= row.computed < row.known <= len(row.tokens), "a row is computed beyond what is known"
            assert (row.slot >= 0) == bool(row.blocks), "a row has a slot without blocks or blocks without a slot"
            assert row.room == len(row.blocks) * self._pool.block_size and row.computed <= row.room, "a row's table is too short"
        slots = [row.slot for row in everyone if row.slot >= 0]
        assert sorted(slots + self._slots) == list(range(self._limits.max_batch_size)), "a slot is lost or shared"
        self._pool.check([row.blocks for row in everyone])
