"""Plans in the making and plans that are out, over the rows of one batch.

Owns what rows of one plan have in common. Must never decide who runs: that is :mod:`workers.scheduler.scheduler`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workers.protocol.engine import Emission
from workers.protocol.messages import Logprobs
from workers.scheduler.sequence import Sequence
from workers.scheduler.step_plan import GUESS, I32, Ints, StepPlan, StepResult, column, view, view_floats

_GUESS = column([GUESS])


class RepeatedStep:
    """What plans that repeat each other have in common: their rows, which all decode. ``due``: rows by the turn after which their blocks
    are full."""

    def __init__(self, rows: list[Sequence]) -> None:
        self._rows = rows
        self.due: dict[int, list[Sequence]] = {}
        for row in rows:
            self.due.setdefault(row.room - row.issued, []).append(row)

    @cached_property
    def _ids(self) -> list[int]:
        return [row.id for row in self._rows]

    @cached_property
    def _offsets(self) -> Ints:
        """From the place of a query token to the output position of the token that follows it."""
        return np.array([1 - row.prompt_len for row in self._rows], I32)

    @cached_property
    def _histories(self) -> list[list[int]]:
        return [row.tokens for row in self._rows]

    @cached_property
    def ends(self) -> frozenset[int | None]:
        """Tokens that are not just emitted, of one row at least."""
        return frozenset().union(*{row.ends for row in self._rows})

    def emit(self, starts: Ints, tokens: list[int]) -> list[Emission]:
        """Give each row its one of ``tokens``, which follows that at its one of ``starts``, both [rows]."""
        # Loops of the interpreter's own, as far as they can be: this is done for every token.
        deque(map(list.append, self._histories, tokens), 0)
        return list(map(Emission, self._ids, (starts + self._offsets).tolist(), [[token] for token in tokens]))


@dataclass(slots=True)
class InFlightStep:
    """A plan that is out: its rows, their query lengths, and whether they yield a token (0 or 1). ``left``: its rows may be in a later
    plan. ``sure``: plans of the same rows that may follow, as long as not more than ``over`` rows of the batch have ended.

    A plan that repeats another is not noted in its rows, nor is the answer to one that is repeated: ``owed`` and ``landed`` are by how much
    their ``issued`` and their ``computed`` are behind, until :meth:`settle`. ``next`` repeats this one, and owes what it owed. ``turn``:
    repetitions up to this plan.
    """

    plan: StepPlan
    rows: list[Sequence]
    counts: list[int]
    samples: list[int]
    left: bool = False
    sure: int = 0
    over: int = 0
    owed: int = 0
    landed: int = 0
    next: InFlightStep | None = None
    turn: int = 0
    streak: RepeatedStep | None = None

    def settle(self) -> None:
        """Pay what is owed."""
        if self.owed or self.landed:
            for row in self.rows:
                row.issued += self.owed
                row.computed += self.landed
            self.owed = self.landed = 0

    def full(self) -> list[Sequence]:
        """Rows that need a block to go on from here; only before anything else is planned for them."""
        if self.streak is None:
            self.streak = RepeatedStep(self.rows)
        return self.streak.due.get(self.turn, [])

    def land(self, tokens: list[int]) -> list[Emission] | None:
        """Emit ``tokens`` [rows], if all that happens to any row is that it gets one: only where none has ended since this plan was
        repeated, and nobody wants to know more. None: look at each, for one might end."""
        if self.next is None or self.streak is None or not self.streak.ends.isdisjoint(tokens):
            return None
        self.next.landed, self.landed = self.landed + 1, 0
        return self.streak.emit(view(self.plan.starts), tokens)

    def again(self, step: int, closed: list[int], fresh: list[int], block_size: int) -> InFlightStep:
        """The plan numbered ``step`` of the same rows, decodes all, each from the token that it has in flight. Those that were
        :meth:`full` have got a block each, ``fresh``."""
        before, grown = self.plan, self.full()
        assert self.streak is not None
        if grown:
            self.streak.due.setdefault(self.turn + block_size, []).extend(self.streak.due.pop(self.turn))
        plan = StepPlan(
            step=step,
            repeats=before.step,
            slots=before.slots,
            starts=(view(before.starts) + 1).tobytes(),
            lengths=before.lengths,
            tokens=_GUESS * len(self.rows),
            sample=before.sample,
            block_slots=column([row.slot for row in grown]),
            block_ids=column(fresh),
            closed=column(closed),
        )
        found = InFlightStep(
            plan,
            self.rows,
            self.counts,
            self.samples,
            sure=self.sure - 1,
            over=self.over,
            owed=self.owed + 1,
            turn=self.turn + 1,
            streak=self.streak,
        )
        self.left, self.next, self.owed = True, found, 0
        return found

    def logprobs(self, chosen: list[int | None], result: StepResult) -> list[Logprobs | None]:
        """Per row, the log-probabilities of its token where it asked for them; ``chosen`` has the row's token or None."""
        own = iter(view_floats(result.logprobs).tolist())
        tops = {i: (view(ids).tolist(), view_floats(logprobs).tolist()) for i, ids, logprobs in result.top}
        scored: list[Logprobs | None] = []
        for i, (row, token) in enumerate(zip(self.rows, chosen, strict=True)):
            logprob = None if token is None else next(own)
            if token is None or row.params.logprobs is None:
                scored.append(None)
            else:
                scored.append(Logprobs(token, logprob, *tops.get(i, ([], []))))
        return scored


class StepDraft:
    """A plan in the making: its rows (the first ``decodes`` of them decode) and their query lengths, the rows that got a slot, those that
    got a block, and those that must wait for one."""

    __slots__ = ("counts", "decodes", "grown", "opened", "rows", "stuck")

    def __init__(self) -> None:
        self.rows: list[Sequence] = []
        self.counts: list[int] = []
        self.decodes = 0
        self.opened: list[Sequence] = []
        self.grown: list[Sequence] = []
        self.stuck: list[Sequence] = []

    def issue(self, step: int, closed: list[int]) -> InFlightStep:
        """The plan numbered ``step``, which also closes the slots ``closed``: its rows are in the air."""
        rows, counts, decodes = self.rows, self.counts, self.decodes
        starts = [row.issued for row in rows]
        tokens: list[int] = []
        for row, start in zip(rows[:decodes], starts, strict=False):
            tokens.append(row.tokens[start] if start < len(row.tokens) else GUESS)
            row.issued = start + 1
        samples, scores = [1] * decodes, [0] * decodes
        for row, count in zip(rows[decodes:], counts[decodes:], strict=True):
            tokens += row.tokens[row.issued : row.issued + count]
            samples.append(int(count == row.pending and not row.spent))
            scores.append(int(row.wants_score()))
            row.issued += count
        added = [(row.slot, row.blocks) for row in self.opened] + [(row.slot, row.blocks[-1:]) for row in self.grown]
        plan = StepPlan(
            step=step,
            slots=column([row.slot for row in rows]),
            starts=column(starts),
            lengths=column(counts),
            tokens=column(tokens),
            sample=column(samples),
            score=column(scores) if any(scores) else b"",
            block_slots=column([slot for slot, blocks in added for _ in blocks]),
            block_ids=column([block for _, blocks in added for block in blocks]),
            closed=column(closed),
            opened=[row.opening() for row in self.opened],
            masks=[(i, row.guide.mask()) for i, row in enumerate(rows) if row.guide is not None and samples[i]],
        )
        return InFlightStep(plan, rows, counts, samples)
