"""In-flight batching: the pure state machine that turns requests into step plans and step results into emissions.

Owns every live sequence, its queue, its slot and its blocks. Must never run a model, read a clock, or read text: time is an argument,
tokens are integers. A request is only "computed < known"; prefill, chunk, prefix hit, resume after failover and decode are one case.

An engine drives it in three calls, the same for every step::

    plan = scheduler.schedule(now)                     # until it returns None: the pipeline is full
    result = ...                                       # the ranks run the plan
    emissions = scheduler.update_from_output(result)   # results come in the order of the plans

A sequence is in one queue or in flight (both only with ``async_scheduling``, see below). Its states, and the events that change them:

    state      queue      event                                        next state
    ---------  ---------  -------------------------------------------  ----------------------------------------------------
    (new)                 submit                                       waiting; paused without credit
    waiting    _waiting   schedule: a slot and its blocks are free     in flight (admitted)
    prefill    _prefills  schedule: the token budget has room          in flight with a chunk of what is pending
    decode     _decodes   schedule: its turn, and it has a block       in flight with one token
    in flight  none       update_from_output                           prefill, decode, paused, or finished
    paused     _paused    credit                                       prefill or decode; waiting if it was preempted meanwhile
               _paused    schedule: PAUSE_S have passed, or others     paused without slot and blocks (preempted)
                          need its blocks
    prefill,              schedule: an older sequence needs a block    waiting (preempted): all of it is computed again
     decode
    any                   cancel                                       finished
    finished   none       update_from_output of its last step          slot and blocks are free

At most ``micro_batches`` steps are in flight over disjoint sequences. Each takes its share of the sequences, so a pipeline stays balanced.

With ``async_scheduling`` one more step may be in flight, with sequences of the oldest one: each continues from a token that only the device
knows yet (a *placeholder*, -1 in the plan). So these sequences are in a queue again while the oldest step is in flight. The end of a
sequence is then seen one step late: the result of its second step is dropped, and its blocks become free only after that. Most of these
steps repeat the previous step, one token further: see :mod:`workers.scheduler.in_flight`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from workers.protocol.engine import PAUSE_S, Emission, Fault, Finish
from workers.protocol.errors import EngineFault
from workers.protocol.messages import STEP_TOKEN_BUCKETS, Capacity, Logprobs, Submit
from workers.protocol.status import EngineStats
from workers.sampling.guide import GuideFactory
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.in_flight import InFlightStep, StepDraft
from workers.scheduler.invariants import check_invariants
from workers.scheduler.sequence import NO_TOKEN, Queue, Sequence, append_plain_tokens, arrival_of, enter_from_placeholders, make_sequence
from workers.scheduler.step_plan import I32, StepPlan, StepResult, view

#: Steps between two checks of an idle scheduler: a check takes 0.3 s with 200,000 findable blocks.
CHECK_STEPS = 256


class Scheduler:
    """Sequences of one replica.

    Args:
        limits: the engine's limits: blocks, ``max_batch_size`` sequences with a slot, ``max_num_tokens`` a step, context, vocabulary;
            and whether sequences reuse blocks by content.
        guides: compiles a sequence's grammar; None = guided requests are refused.
        micro_batches: steps that may be in flight, at least the number of pipeline stages.
        async_scheduling: whether one more step may be in flight, with sequences whose last token is still being sampled. eos_ids:
        end-of-sequence ids of the model.
    """

    def __init__(
        self,
        limits: Capacity,
        *,
        guides: GuideFactory | None = None,
        micro_batches: int = 1,
        async_scheduling: bool = False,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._limits = limits
        self._guides = guides
        self._micro_batches = micro_batches
        self._async_scheduling = async_scheduling
        self._eos_ids = frozenset(eos_ids)
        self._pool = BlockPool(limits.num_blocks, limits.block_size, findable=limits.prefix_cache)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: Queue = deque()  # without a slot; by arrival
        self._prefills: Queue = deque()  # with a slot and a prompt to compute; by arrival
        self._decodes: Queue = deque()  # with a slot and one pending token that yields the next; least recently served first
        self._paused: Queue = deque()  # without credit; with or without a slot
        self._steps: deque[InFlightStep] = deque()  # in flight, oldest first
        self._free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._closed_slots: list[int] = []  # ranks learn of them with the next plan
        #: The state at the last refusal of :meth:`_admit`: (sequence, free blocks, slots in use). It refuses the same state again without a
        #: check.
        self._last_refusal: tuple[int, int, int] | None = None
        self._short_of_blocks = False  # the last plan omitted a sequence because no block was free
        self._now = 0.0
        self._arrivals = self._finished_total = 0
        self._step, self._checked_step = 0, 0
        self._prompt_tokens = self._output_tokens = self._prefix_queries = self._prefix_hits = self._preemptions = 0
        self._step_tokens, self._step_tokens_total = [0] * (len(STEP_TOKEN_BUCKETS) + 1), 0

    # Commands

    def submit(self, id: int, request: Submit) -> None:
        """Queue a request. Raises TooLong, Rejected or Unsupported, and then keeps nothing of it; ``id`` must not be live."""
        if id in self._sequences:
            raise ValueError(f"sequence {id} is live already")
        seq = make_sequence(id, self._arrivals, request, self._limits, self._eos_ids, self._guides)
        self._arrivals += 1
        self._sequences[id] = seq
        self._enqueue(seq)

    def cancel(self, id: int) -> None:
        """Forget a sequence; its blocks become free at once, or after the step in flight that may still write them. Unknown ids are
        ignored."""
        seq = self._sequences.pop(id, None)
        if seq is not None:
            self._finish(seq)

    def credit(self, id: int, tokens: int) -> None:
        """Allow ``tokens`` more to be emitted. Unknown ids are ignored."""
        seq = self._sequences.get(id)
        if seq is None:
            return
        seq.add_credit(tokens)
        if seq.queue is self._paused and seq.credit > 0:
            seq.leave_queue()
            self._enqueue(seq)

    # Facts

    def busy(self, now: float = 0.0) -> bool:
        """Whether a step is in flight or :meth:`schedule` would do something: sequences run or wait, or a paused one is due to lose its
        K/V."""
        return bool(self._steps or self._decodes or self._prefills or self._waiting) or any(self._overdue(max(now, self._now)))

    def predicted_tokens(self) -> int:
        """Upper bound of the tokens in the next plan, for a cost model."""
        total = len(self._decodes)
        for seq in chain(self._prefills, self._waiting):
            if total >= self._limits.max_num_tokens:
                break
            total += seq.pending
        return min(total, self._limits.max_num_tokens)

    def stats(self, step_ms: float = 0.0) -> EngineStats:
        """Counts now and totals; ``running`` sequences have a slot, ``waiting`` ones need one (sequences without credit do not count).
        Prefix queries and hits are counted in tokens."""
        return EngineStats(
            running=sum(seq.slot >= 0 for seq in self._sequences.values()),
            waiting=len(self._waiting),
            free_blocks=self._pool.available,
            prefill_tokens=sum(seq.pending for seq in chain(self._prefills, self._waiting)),
            step_ms=step_ms,
            prompt_tokens_total=self._prompt_tokens,
            output_tokens_total=self._output_tokens,
            prefix_queries_total=self._prefix_queries,
            prefix_hits_total=self._prefix_hits,
            preemptions_total=self._preemptions,
            step_tokens=self._step_tokens.copy(),
            step_tokens_total=self._step_tokens_total,
        )

    # Schedule

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """The next step's plan, or None if enough steps are in flight or no sequence can run. ``now``: seconds of any monotonic clock."""
        self._now = max(now, self._now)
        if len(self._steps) >= self._micro_batches:
            if not self._async_scheduling or len(self._steps) > self._micro_batches:
                return None
            if (repeated := self._schedule_ahead(self._steps[0])) is not None:
                return repeated
        for seq in list(self._overdue(self._now)):
            self._preempt(seq)
        draft = self._draft()
        if not draft.sequences and self._waiting and not self._steps:
            # Only paused sequences hold the blocks that the first waiting one needs, and no other sequence will release any.
            for seq in [seq for seq in self._paused if seq.slot >= 0]:
                self._preempt(seq)
            draft = self._draft()
        return self._issue(draft) if draft.sequences else None

    def _schedule_ahead(self, oldest: InFlightStep) -> StepPlan | None:
        """All micro-batches are in flight. One more step may be issued: return the plan that repeats the ``oldest`` one, or None if it
        cannot be repeated; then its sequences are in the queues, for the next draft.

        If blocks are short they are not in the queues: a sequence in flight cannot be preempted, so its result must arrive first. The
        deferred counts of repeated steps need not be applied in this case: their sequences are in no queue, so the draft does not read
        them.
        """
        if self._short_of_blocks:
            return None
        repeated = self._repeat(oldest)
        if repeated is None:
            self._apply_deferred()
            self._schedule_early(oldest)
        return repeated

    def _repeat(self, step: InFlightStep) -> StepPlan | None:
        """The plan of ``step`` one token further; None if one of its sequences may end before, if another one could run with them, or if
        blocks are short."""
        if step.safe_repeats <= 0 or step.finished_at_issue != self._finished_total:
            return None
        if self._decodes or self._prefills or (self._waiting and self._free_slots) or any(self._overdue(self._now)):
            return None
        full = step.need_block()
        fresh = self._pool.allocate(len(full))
        if fresh is None:
            return None
        for seq, block in zip(full, fresh, strict=True):
            seq.add_block(block, self._pool.block_size)
        return self._send(step.repeat(self._step + 1, self._closed_slots, fresh, self._pool.block_size))

    def _schedule_early(self, step: InFlightStep) -> None:
        """Let the sequences of ``step`` be scheduled again before its result has arrived: from the next chunk, or from a placeholder."""
        if step.early:
            return
        step.early = True
        for seq in enter_from_placeholders(self._decodes, step.sequences, step.yields):
            self._enqueue(seq)

    def _draft(self) -> StepDraft:
        """Choose the next step's sequences: decodes, then prefill chunks, then admissions, under the token budget and this step's share."""
        draft = StepDraft()
        decodes, sequences = self._decodes, draft.sequences
        budget = self._limits.max_num_tokens
        paused = sum(seq.slot >= 0 for seq in self._paused)
        active = min(self._slots_in_use - paused + len(self._waiting), self._limits.max_batch_size)
        share = -(-active // self._micro_batches)
        most = min(share, budget)
        while decodes and len(sequences) < most:
            seq = decodes.popleft()
            if seq.scheduled == seq.block_capacity and not self._grow(seq, draft):
                continue
            sequences.append(seq)
        for seq in reversed(draft.stuck):
            seq.enter_first(decodes)
        self._short_of_blocks = bool(draft.stuck)
        draft.decodes = len(sequences)
        draft.counts = [1] * draft.decodes
        budget -= draft.decodes
        while budget and len(sequences) < share and (prefill := self._next_prefill(draft)) is not None:
            sequences.append(prefill)
            draft.counts.append(min(prefill.pending, budget))
            budget -= draft.counts[-1]
        return draft

    def _grow(self, seq: Sequence, draft: StepDraft) -> bool:
        """Give a block to a sequence that was popped from the decodes; if none is free, preempt the youngest one, which may be the sequence
        itself. False: the sequence is not in this step."""
        seq.taken()
        while (fresh := self._pool.allocate(1)) is None:
            victim = self._victim(seq)
            if victim is None:  # all other blocks belong to sequences of this step or in flight: retry after them
                draft.stuck.append(seq)
                return False
            self._preempt(victim)
            if victim is seq:
                return False
        seq.add_block(fresh[0], self._pool.block_size)
        draft.grown.append(seq)
        return True

    def _victim(self, seq: Sequence) -> Sequence | None:
        """The sequence to preempt so that ``seq`` gets a block: the youngest paused one, else the youngest that is neither in flight nor in
        the draft, which may be ``seq`` itself. None: all other blocks belong to sequences in flight or in the draft."""
        if holders := [other for other in self._paused if other.slot >= 0]:
            return max(holders, key=arrival_of)
        others = [other for other in chain(self._decodes, self._prefills) if not other.in_flight]
        if not others:
            return None
        youngest = max(others, key=arrival_of)
        if youngest.arrival > seq.arrival:
            return youngest
        return None if seq.in_flight else seq

    def _next_prefill(self, draft: StepDraft) -> Sequence | None:
        """Take the oldest sequence that has a slot and a prompt to compute, else admit the oldest waiting one."""
        if self._prefills:
            return self._prefills.popleft()
        if self._waiting and self._free_slots and self._admit(self._waiting[0]):
            seq = self._waiting.popleft()
            draft.opened.append(seq)
            return seq
        return None

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence a slot, the blocks found for its prefix, and new blocks for its other known tokens."""
        state = (seq.id, self._pool.available, self._slots_in_use)
        if state == self._last_refusal:
            return False
        size = self._pool.block_size
        found: list[int] = []
        if seq.prompt_logprobs is None and self._pool.findable:
            found = self._pool.match(seq.findable_hashes(size), seq.tokens, seq.prefix.salt)
        self._pool.hold(found)
        need = -(-seq.known // size) - len(found)
        # One block in reserve for each running sequence: otherwise the next block of an older sequence would preempt the new one.
        fresh = self._pool.allocate(need) if need + self._slots_in_use <= self._pool.available else None
        if fresh is None:
            self._pool.release(found)
            self._last_refusal = state
            return False
        if seq.cached_tokens < 0:  # this is its first admission
            self._prompt_tokens += seq.prompt_len
            self._prefix_queries += seq.prompt_len
            self._prefix_hits += min(len(found) * size, seq.prompt_len)
        seq.admit(self._free_slots.pop(), found, fresh, self._pool)
        return True

    def _issue(self, draft: StepDraft) -> StepPlan:
        """Turn a draft into the plan."""
        step = draft.issue(self._step + 1, self._closed_slots)
        # It has exactly the sequences of the step from which they continue, so the next steps can probably repeat it.
        if self._async_scheduling and draft.decodes == len(draft.sequences) and self._steps and self._steps[0].sequences == draft.sequences:
            step.safe_repeats = min([seq.async_until - len(seq.tokens) for seq in draft.sequences]) - 1
            step.finished_at_issue = self._finished_total
        return self._send(step)

    def _send(self, step: InFlightStep) -> StepPlan:
        """Count a step as in flight."""
        self._step += 1
        tokens = len(step.plan.tokens) // I32.itemsize
        self._step_tokens[bisect_left(STEP_TOKEN_BUCKETS, tokens)] += 1
        self._step_tokens_total += tokens
        self._closed_slots = []
        self._steps.append(step)
        return step.plan

    # Update

    def update_from_output(self, result: StepResult) -> list[Emission]:
        """Apply the result of the oldest step in flight. Raises EngineFault if ``result`` belongs to another step."""
        if not self._steps or self._steps[0].plan.step != result.step:
            expected = self._steps[0].plan.step if self._steps else None
            raise EngineFault("a step's result came out of order", f"expected step {expected}, got {result.step}")
        step = self._steps.popleft()
        sampled = view(result.tokens).tolist()
        if step.all_plain(result, sampled, self._finished_total):
            self._output_tokens += len(sampled)
            return step.append_to_all(sampled)
        step.apply_deferred()
        for i, *columns in result.prompt_logprobs:
            if not step.sequences[i].finished:
                step.sequences[i].add_prompt_logprobs(*columns)
        tokens, logprobs = step.tokens_and_logprobs(sampled, result)
        emissions, special, idle = append_plain_tokens(step.sequences, step.counts, tokens, logprobs)
        dropped = silent = 0
        for i in special:
            emission = self._update_sequence(step.sequences[i], tokens[i], logprobs[i])
            if emission is None:
                dropped += 1
            else:
                emissions.insert(i - dropped, emission)
                silent += not emission.tokens
        self._output_tokens += len(emissions) - silent
        if step.repeated_by is None:  # else its sequences are in flight, although their counts may not include it yet
            for seq in idle:
                if not seq.finished:
                    self._enqueue(seq)
        return emissions

    def _update_sequence(self, seq: Sequence, token: int, logprobs: Logprobs | None) -> Emission | None:
        """Apply the result of one step, already counted as computed, to a sequence that needs more than an appended token. None: nothing is
        emitted."""
        if seq.finished:  # it ended or was cancelled while in flight; after its last step no plan writes its blocks
            if not seq.in_flight:
                self._free(seq)
            return None
        if seq.computed >= seq.prefix.publish_at:
            seq.publish(self._pool)
        if token != NO_TOKEN:
            emission = seq.accept(token, logprobs)
        elif seq.computed == seq.known:
            emission = seq.accept_nothing()
        else:
            return None
        if emission.end is not None:
            self._end_by_emission(seq, emission.end)
        return emission

    # Transitions

    def _enqueue(self, seq: Sequence) -> None:
        """Put a sequence that is not in flight into the queue where it belongs."""
        if seq.credit <= 0:
            seq.pause(self._paused, self._now)
        elif seq.slot >= 0 and seq.pending == 1 and not seq.nothing_to_emit:
            seq.enter(self._decodes)
        else:
            seq.enter_by_arrival(self._waiting if seq.slot < 0 else self._prefills)

    def _preempt(self, seq: Sequence) -> None:
        """Take slot and blocks from a sequence that is not in flight; all its known tokens are computed again later."""
        seq.leave_queue()
        self._free(seq)
        self._preemptions += 1
        seq.preempt()
        self._enqueue(seq)

    def _free(self, seq: Sequence) -> None:
        """Free a sequence's slot and blocks; the next plan tells the ranks."""
        if seq.slot < 0:
            return
        slot = seq.give_up_slot(self._pool)
        self._free_slots.append(slot)
        self._closed_slots.append(slot)

    def _end_by_emission(self, seq: Sequence, end: Finish | Fault) -> None:
        """End a sequence after its last emission."""
        faulty = isinstance(end, Fault)
        if faulty:
            self._pool.forget(seq.blocks)  # the fault of this sequence must not spread through the prefix cache
        del self._sequences[seq.id]
        self._finish(seq, faulty=faulty)

    def _finish(self, seq: Sequence, *, faulty: bool = False) -> None:
        """Stop a sequence. Its blocks become free now, or after the last step in flight that may still write them."""
        self._apply_deferred()
        seq.finish(faulty=faulty)
        self._finished_total += 1
        if not seq.in_flight:
            self._free(seq)

    def _apply_deferred(self) -> None:
        """Apply the deferred counts of repeated steps to every sequence."""
        for step in self._steps:
            step.apply_deferred()

    def _overdue(self, now: float) -> Iterator[Sequence]:
        """Paused sequences that must release their K/V now."""
        return (seq for seq in self._paused if seq.slot >= 0 and now - seq.paused_at >= PAUSE_S)

    @property
    def _slots_in_use(self) -> int:
        return self._limits.max_batch_size - len(self._free_slots)

    # Invariants

    def on_idle(self) -> None:
        """Run :meth:`check`, if there is nothing to do and ``CHECK_STEPS`` have passed since the last time."""
        if self._step - self._checked_step >= CHECK_STEPS and not self.busy():
            self._checked_step = self._step
            self.check()

    def check(self) -> None:
        """Check the invariants of sequences, queues, slots and blocks. Raises AssertionError naming the first one broken."""
        self._apply_deferred()
        check_invariants(
            self._sequences,
            self._steps,
            self._pool,
            waiting=self._waiting,
            prefills=self._prefills,
            decodes=self._decodes,
            paused=self._paused,
            free_slots=self._free_slots,
            slot_count=self._limits.max_batch_size,
        )
