"""Plans in the making and plans that are out, over the rows of one batch.

Owns what rows of one plan have in common. Must never decide who runs: that is :mod:`workers.core.batch`.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.core.plan import GUESS, StepPlan, StepResult, column, view, view_floats
from workers.core.rows import Row
from workers.wire import Logprobs

_GUESS = column([GUESS])


@dataclass(slots=True)
class Flight:
    """A plan that is out: its rows, their query lengths, and whether they yield a token (0 or 1). ``left``: its rows may be in a later
    plan. ``sure``: plans of the same rows that may follow, as long as not more than ``over`` rows of the batch have ended.

    A plan that repeats another is not noted in its rows: ``owed`` is by how much their ``issued`` is behind, until :meth:`settle`.
    ``repeated``: another one repeats this one, and owes what it owed. ``turn``: repetitions up to this plan; ``due``: rows by the turn
    after which their blocks are full, one table for all repetitions.
    """

    plan: StepPlan
    rows: list[Row]
    counts: list[int]
    samples: list[int]
    left: bool = False
    sure: int = 0
    over: int = 0
    owed: int = 0
    repeated: bool = False
    turn: int = 0
    due: dict[int, list[Row]] | None = None

    def settle(self) -> None:
        """Pay what is owed."""
        if self.owed:
            for row in self.rows:
                row.issued += self.owed
            self.owed = 0

    def full(self) -> list[Row]:
        """Rows that need a block to go on from here; only before anything else is planned for them."""
        if self.due is None:
            self.due = {}
            for row in self.rows:
                self.due.setdefault(row.room - row.issued, []).append(row)
        return self.due.get(self.turn, [])

    def again(self, step: int, closed: list[int], block_size: int) -> Flight:
        """The plan numbered ``step`` of the same rows, decodes all, each from the token that it has in flight. Those that were
        :meth:`full` have got a block."""
        before, grown = self.plan, self.full()
        assert self.due is not None
        if grown:
            self.due.setdefault(self.turn + block_size, []).extend(self.due.pop(self.turn))
        plan = StepPlan(
            step=step,
            repeats=before.step,
            slots=before.slots,
            starts=(view(before.starts) + 1).tobytes(),
            lengths=before.lengths,
            tokens=_GUESS * len(self.rows),
            sample=before.sample,
            block_slots=column([row.slot for row in grown]),
            block_ids=column([row.blocks[-1] for row in grown]),
            closed=column(closed),
        )
        found = Flight(
            plan,
            self.rows,
            self.counts,
            self.samples,
            sure=self.sure - 1,
            over=self.over,
            owed=self.owed + 1,
            turn=self.turn + 1,
            due=self.due,
        )
        self.left, self.repeated, self.owed = True, True, 0
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


class Draft:
    """A plan in the making: its rows (the first ``decodes`` of them decode) and their query lengths, the rows that got a slot, those that
    got a block, and those that must wait for one."""

    __slots__ = ("counts", "decodes", "grown", "opened", "rows", "stuck")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.counts: list[int] = []
        self.decodes = 0
        self.opened: list[Row] = []
        self.grown: list[Row] = []
        self.stuck: list[Row] = []

    def issue(self, step: int, closed: list[int]) -> Flight:
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
        return Flight(plan, rows, counts, samples)
