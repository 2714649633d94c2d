"""What the routing core measures of one model: waits, guesses against what came, and rows that had to move.

Owns :class:`Histogram`, the :class:`Attempt` records of rows, and the counts made of them. Pure arithmetic on times that it is given;
touched once a placement, never once a token. Prometheus text is made elsewhere, at the scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

#: Seconds. The first bucket is 1 ms, for a queue that is empty and a model that is small.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)

#: Why a replica was chosen: no other had a place, its session's last, a prefix that it probably holds, or the least wait alone.
Reason = Literal["only", "session", "prefix", "load"]
REASONS: tuple[Reason, ...] = ("only", "session", "prefix", "load")

#: How a replica was lost.
LossKind = Literal["silent", "hung", "unreachable", "left", "replaced"]
LOSS_KINDS: tuple[LossKind, ...] = ("silent", "hung", "unreachable", "left", "replaced")
#: Why a row had to move: its replica was lost, refused it, did not acknowledge it in time, or ended it before its last token.
Cause = Literal["silent", "hung", "unreachable", "left", "replaced", "refused", "unanswered", "short"]
CAUSES: tuple[Cause, ...] = (*LOSS_KINDS, "refused", "unanswered", "short")


class Histogram:
    """Counts per bucket, cumulated only at export."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight

    def cumulated(self) -> list[tuple[str, int]]:
        rows, running = [], 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows


class Attempt:
    """One stay of a row at a replica. Times are the core's, seconds, 0 = not yet; ``held``: output tokens when it was sent.

    ``tokens``: prompt tokens that it was expected to compute; ``cached``: those it was expected to find there, None where nothing was
    guessed; ``expected_s``: the wait for its first token, as it was guessed. ``cause``: why it ended before the row did, else empty.
    """

    __slots__ = ("attempt", "cached", "cause", "epoch", "expected_s", "first_at", "held", "over_at", "queued_at", "reason", "replica",
                 "sent_at", "tokens")  # fmt: skip

    def __init__(self, replica: str, epoch: int, reason: Reason, *, tokens: int, cached: int | None, expected_s: float) -> None:
        self.replica, self.epoch, self.reason = replica, epoch, reason
        self.tokens, self.cached, self.expected_s = tokens, cached, expected_s
        self.attempt = self.held = 0
        self.queued_at = self.sent_at = self.first_at = self.over_at = 0.0
        self.cause: Cause | Literal[""] = ""


class ModelStats:
    """One model at one router. ``resumed`` and ``failed``: rows that had to move, by what became of them."""

    def __init__(self) -> None:
        self.decisions: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.moved: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.resumed: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.failed: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.losses: dict[LossKind, int] = dict.fromkeys(LOSS_KINDS, 0)
        self.choices, self.limits = Histogram(CHOICE_BUCKETS), Histogram(TOKEN_BUCKETS)
        self.queue, self.prefill, self.decode, self.inference = Histogram(), Histogram(), Histogram(), Histogram()
        self.expected_wait, self.actual_wait, self.wait_error = Histogram(), Histogram(), Histogram()
        self.pause = Histogram()
        self.expected_hits = self.actual_hits = 0

    def asked(self, choices: int, max_tokens: int) -> None:
        """A request was admitted."""
        self.choices.observe(choices)
        self.limits.observe(max_tokens)

    def placed(self, trail: Sequence[Attempt]) -> None:
        """A row was sent to a replica; its last placement says where."""
        last = trail[-1]
        self.decisions[last.reason] += 1
        if len(trail) == 1:
            self.queue.observe(last.sent_at - last.queued_at)

    def began(self, trail: Sequence[Attempt], now: float) -> None:
        """The first tokens of its last placement are here."""
        last = trail[-1]
        if last.first_at:
            return
        last.first_at = now
        wait = now - last.sent_at
        self.expected_wait.observe(last.expected_s)
        self.actual_wait.observe(wait)
        self.wait_error.observe(abs(wait - last.expected_s))
        if len(trail) == 1:
            self.prefill.observe(wait)
        else:
            self._resume(trail[-2], now)

    def moves(self, trail: Sequence[Attempt], cause: Cause, now: float) -> None:
        """A row lost its place and waits for another."""
        last = trail[-1]
        last.cause, last.over_at = cause, now
        self.moved[cause] += 1

    def ended(self, trail: Sequence[Attempt], now: float, cached: int | None = None) -> None:
        """A row has its last token; ``cached``: prompt tokens that its replica found, where it said so."""
        if not trail:
            return
        last = trail[-1]
        if (before := _open_move(trail)) is not None:
            self._resume(before, now)
        if trail[0].first_at:
            self.decode.observe(now - trail[0].first_at)
        self.inference.observe(now - trail[0].sent_at)
        if cached is not None and last.cached is not None:
            self.expected_hits += last.cached
            self.actual_hits += cached

    def gave_up(self, trail: Sequence[Attempt]) -> None:
        """A row failed; it counts here only where it had lost its place and not got on since."""
        if (before := _open_move(trail)) is not None and before.cause:
            self.failed[before.cause] += 1

    def _resume(self, before: Attempt, now: float) -> None:
        if before.cause:
            self.resumed[before.cause] += 1
            self.pause.observe(now - before.over_at)


def _open_move(trail: Sequence[Attempt]) -> Attempt | None:
    """The placement that a row lost and has not got on from: the last one, or the one before while no token of the last is here."""
    if not trail:
        return None
    if trail[-1].cause:
        return trail[-1]
    return trail[-2] if len(trail) > 1 and not trail[-1].first_at else None
