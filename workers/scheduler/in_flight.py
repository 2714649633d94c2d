"""Drafts of steps and steps in flight, over the sequences of one scheduler.

Owns the common state of the sequences of one step, and the fast path for a *repeated step*. Must never decide which sequence runs: that is
:mod:`workers.scheduler.scheduler`.

Why there is a fast path: in steady decoding a step has the same sequences as the previous step, one position further, and each of them gets
only one more token. Visiting every sequence twice per step, to schedule it and to append its token, would cost the host more than
everything else. So:

1. :meth:`InFlightStep.repeat` derives the next plan from the plan of the previous step, by a few operations on whole columns. It does not
change the sequences. It records in the new step that each sequence has one more scheduled token than its own count
(``deferred_scheduled``).
2. :meth:`InFlightStep.append_to_all` applies the result of a step that was repeated. It appends the tokens in one loop in C, and records in
the next step that each sequence has one more computed token (``deferred_computed``).
3. :meth:`InFlightStep.apply_deferred` writes both counts into the sequences. The scheduler calls it before it reads a single sequence:
   when one ends, is cancelled or admitted, or when a step cannot be repeated.
4. ``safe_repeats`` bounds the repetitions: it is the number of tokens that can be appended before a sequence reaches its last token or uses
up its credit. A special token (:meth:`InFlightStep.all_plain`) ends the fast path, and so does the end of any sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workers.protocol.engine import Emission
from workers.protocol.messages import Logprobs
from workers.scheduler.sequence import NO_TOKEN, Sequence, add_counts, append_tokens, schedule_decodes
from workers.scheduler.step_plan import I32, PLACEHOLDER, Ints, StepPlan, StepResult, column, view, view_floats

_PLACEHOLDER = column([PLACEHOLDER])


class RepeatedStep:
    """The common state of a step and its repetitions: their sequences, each of which decodes one token per step.

    ``full_at``: sequences by the repetition after which their blocks are full.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences
        self.full_at: dict[int, list[Sequence]] = {}
        for seq in sequences:
            self.full_at.setdefault(seq.block_capacity - seq.scheduled, []).append(seq)

    @cached_property
    def _ids(self) -> list[int]:
        return [seq.id for seq in self._sequences]

    @cached_property
    def _output_offsets(self) -> Ints:
        """[sequences]: added to the position of a query token, the output position of the token that follows it."""
        return np.array([1 - seq.prompt_len for seq in self._sequences], I32)

    @cached_property
    def _histories(self) -> list[list[int]]:
        return [seq.tokens for seq in self._sequences]

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that are special in at least one sequence."""
        return frozenset().union(*{seq.special_tokens for seq in self._sequences})

    def append(self, starts: Ints, tokens: list[int]) -> list[Emission]:
        """Append to each sequence its entry of ``tokens``, which follows the token at its entry of ``starts``; both [sequences]."""
        append_tokens(self._histories, tokens)
        # Uses the interpreter's own loops where possible, because this runs for every token.
        return list(map(Emission, self._ids, (starts + self._output_offsets).tolist(), [[token] for token in tokens]))


@dataclass(slots=True)
class InFlightStep:
    """A plan that was issued: its sequences, their query lengths, and whether each yields a token (0 or 1).

    ``early``: its sequences may be in a later step, or in a queue, although its result has not arrived.

    Fields of the fast path (see the module's docstring): ``repeated_by`` is the step that repeats this one; ``shared`` is their common
    state. ``repetition`` counts the repetitions up to this step. ``safe_repeats`` more may follow, as long as no sequence finishes:
    ``finished_at_issue`` is the number of sequences that the scheduler had finished when the first of these steps was issued.
    ``deferred_scheduled`` and ``deferred_computed`` tokens of each sequence are not yet counted in the sequence.
    """

    plan: StepPlan
    sequences: list[Sequence]
    counts: list[int]
    yields: list[int]
    early: bool = False
    repeated_by: InFlightStep | None = None
    shared: RepeatedStep | None = None
    repetition: int = 0
    safe_repeats: int = 0
    finished_at_issue: int = 0
    deferred_scheduled: int = 0
    deferred_computed: int = 0

    def apply_deferred(self) -> None:
        """Add the deferred counts of this step to its sequences."""
        if self.deferred_scheduled or self.deferred_computed:
            add_counts(self.sequences, scheduled=self.deferred_scheduled, computed=self.deferred_computed)
            self.deferred_scheduled = self.deferred_computed = 0

    def need_block(self) -> list[Sequence]:
        """Sequences that need a block before this step is repeated. Call it only before anything else is scheduled for them."""
        if self.shared is None:
            self.shared = RepeatedStep(self.sequences)
        return self.shared.full_at.get(self.repetition, [])

    def repeat(self, step: int, closed: list[int], fresh: list[int], block_size: int) -> InFlightStep:
        """The repeated step, numbered ``step``: the same sequences, each from the token that it has in flight. The sequences of
        :meth:`need_block` have each got a block of ``fresh``."""
        before, grown = self.plan, self.need_block()
        assert self.shared is not None
        if grown:
            self.shared.full_at.setdefault(self.repetition + block_size, []).extend(self.shared.full_at.pop(self.repetition))
        plan = StepPlan(
            step=step,
            repeats=before.step,
            slots=before.slots,
            starts=(view(before.starts) + 1).tobytes(),
            lengths=before.lengths,
            tokens=_PLACEHOLDER * len(self.sequences),
            sample=before.sample,
            block_slots=column([seq.slot for seq in grown]),
            block_ids=column(fresh),
            closed=column(closed),
        )
        self.repeated_by = InFlightStep(
            plan,
            self.sequences,
            self.counts,
            self.yields,
            shared=self.shared,
            repetition=self.repetition + 1,
            safe_repeats=self.safe_repeats - 1,
            finished_at_issue=self.finished_at_issue,
            deferred_scheduled=self.deferred_scheduled + 1,
        )
        self.early, self.deferred_scheduled = True, 0
        return self.repeated_by

    def all_plain(self, result: StepResult, tokens: list[int], finished_total: int) -> bool:
        """Whether ``result`` only appends one of ``tokens`` to each sequence: this step was repeated, no sequence has finished since
        (``finished_total``: number of finished sequences now), no token is special, and there are no log-probabilities."""
        return (
            self.repeated_by is not None
            and self.shared is not None
            and finished_total == self.finished_at_issue
            and not result.logprobs
            and self.shared.special_tokens.isdisjoint(tokens)
        )

    def append_to_all(self, tokens: list[int]) -> list[Emission]:
        """Append ``tokens`` [sequences] if :meth:`all_plain` holds."""
        assert self.repeated_by is not None and self.shared is not None
        self.repeated_by.deferred_computed, self.deferred_computed = self.deferred_computed + 1, 0
        return self.shared.append(view(self.plan.starts), tokens)

    def tokens_and_logprobs(self, sampled: list[int], result: StepResult) -> tuple[list[int], list[Logprobs | None]]:
        """For each sequence, its entry of the ``sampled`` tokens, or NO_TOKEN if it only computed a chunk; and the token's
        log-probabilities, or None if they were not requested."""
        tokens = sampled
        if len(tokens) < len(self.sequences):
            rest = iter(sampled)
            tokens = [next(rest) if yields else NO_TOKEN for yields in self.yields]
        if not result.logprobs:
            return tokens, [None] * len(tokens)
        own = iter(view_floats(result.logprobs).tolist())
        tops = {i: (view(ids).tolist(), view_floats(logprobs).tolist()) for i, ids, logprobs in result.top}
        found: list[Logprobs | None] = []
        for i, (seq, token) in enumerate(zip(self.sequences, tokens, strict=True)):
            logprob = None if token == NO_TOKEN else next(own)
            if token == NO_TOKEN or seq.params.logprobs is None:
                found.append(None)
            else:
                found.append(Logprobs(token, logprob, *tops.get(i, ([], []))))
        return tokens, found


class StepDraft:
    """The draft of a step.

    ``sequences``: its sequences, first the ``decodes`` of them that decode; ``counts``: their query lengths. ``opened`` got a slot,
    ``grown`` got a block, and ``stuck`` must wait for one.
    """

    __slots__ = ("counts", "decodes", "grown", "opened", "sequences", "stuck")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.decodes = 0
        self.opened: list[Sequence] = []
        self.grown: list[Sequence] = []
        self.stuck: list[Sequence] = []

    def issue(self, step: int, closed: list[int]) -> InFlightStep:
        """Issue the step with the number ``step``, which also closes the slots ``closed``. Its sequences are in flight from now on."""
        sequences, counts, decodes = self.sequences, self.counts, self.decodes
        starts = [seq.scheduled for seq in sequences]
        tokens = schedule_decodes(sequences[:decodes])
        yields, to_score = [1] * decodes, [0] * decodes
        for seq, count in zip(sequences[decodes:], counts[decodes:], strict=True):
            chunk, yields_token, scores_prompt = seq.schedule_chunk(count)
            tokens += chunk
            yields.append(int(yields_token))
            to_score.append(int(scores_prompt))
        added = [(seq.slot, seq.blocks) for seq in self.opened] + [(seq.slot, seq.blocks[-1:]) for seq in self.grown]
        plan = StepPlan(
            step=step,
            slots=column([seq.slot for seq in sequences]),
            starts=column(starts),
            lengths=column(counts),
            tokens=column(tokens),
            sample=column(yields),
            score=column(to_score) if any(to_score) else b"",
            block_slots=column([slot for slot, blocks in added for _ in blocks]),
            block_ids=column([block for _, blocks in added for block in blocks]),
            closed=column(closed),
            opened=[seq.open_slot() for seq in self.opened],
            masks=[(i, seq.guide.mask()) for i, seq in enumerate(sequences) if seq.guide is not None and yields[i]],
        )
        return InFlightStep(plan, sequences, counts, yields)
