"""The routing core's statistics of one model: waits, estimates and actual values, and choices that had to move to another replica.

Owns :class:`Histogram` and the counts. An :class:`Attempt` is written by :mod:`orchestrator.router.core.request_table` and only read here.
Pure arithmetic on given times, once per attempt and never per token. Prometheus text is made elsewhere, at the scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import msgspec

#: Seconds. The first bucket is 1 ms, for a queue that is empty and a model that is small.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)

#: Why a replica was chosen: no other had a place, the session ran there last, it probably holds the prefix, or its wait is the least.
PlacementReason = Literal["only", "session", "prefix", "load"]
PLACEMENT_REASONS: tuple[PlacementReason, ...] = ("only", "session", "prefix", "load")

#: How a replica was lost.
LossKind = Literal["silent", "hung", "unreachable", "left", "replaced"]
LOSS_KINDS: tuple[LossKind, ...] = ("silent", "hung", "unreachable", "left", "replaced")
#: Why a choice had to move: its replica was lost, refused it, did not acknowledge it in time, ended it before its last token, sent invalid
#: data about it, or made no progress with it.
Cause = Literal["silent", "hung", "unreachable", "left", "replaced", "refused", "unanswered", "short", "invalid", "stalled"]
CAUSES: tuple[Cause, ...] = (*LOSS_KINDS, "refused", "unanswered", "short", "invalid", "stalled")


class Histogram:
    """Counts per bucket, accumulated only at export."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight

    def cumulated(self) -> list[tuple[str, int]]:
        buckets, total = [], 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets


class Attempt(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """One stay of a choice at a replica. Times are the core's, seconds; 0 = has not happened.

    ``number`` counts up over all attempts of a choice, also those that other routers made. ``tokens``: prompt tokens that the replica was
    expected to compute; ``cached``: tokens that it was expected to find in its cache, None where nothing was estimated; ``expected_s``: the
    estimated wait for the first token. ``emitted_before``: output tokens that were here when the choice was sent. ``reattached``: how often
    the router asked the replica for the tokens that it missed. ``cause``: why the attempt ended before the choice did, else empty.
    """

    replica: str
    epoch: int
    number: int
    placed_because: PlacementReason
    tokens: int
    cached: int | None
    expected_s: float
    emitted_before: int
    queued_at: float
    sent_at: float
    accepted_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    reattached: int = 0
    cause: Cause | Literal[""] = ""


class ModelStats:
    """One model at one router. ``resumed`` and ``failed``: choices that had to move, by their result. ``attempts``, everywhere: those of a
    choice, in order."""

    def __init__(self) -> None:
        self.decisions: dict[PlacementReason, int] = dict.fromkeys(PLACEMENT_REASONS, 0)
        self.moved: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.resumed: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.failed: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.losses: dict[LossKind, int] = dict.fromkeys(LOSS_KINDS, 0)
        self.choices, self.limits = Histogram(CHOICE_BUCKETS), Histogram(TOKEN_BUCKETS)
        self.queue, self.prefill, self.decode, self.inference = Histogram(), Histogram(), Histogram(), Histogram()
        self.expected_wait, self.actual_wait, self.wait_error = Histogram(), Histogram(), Histogram()
        self.pause = Histogram()
        self.expected_hits = self.actual_hits = 0

    def note_admitted(self, choices: int, max_tokens: int) -> None:
        """The router took in a request."""
        self.choices.observe(choices)
        self.limits.observe(max_tokens)

    def note_sent(self, attempts: Sequence[Attempt]) -> None:
        """A choice was sent to a replica: the last attempt."""
        last = attempts[-1]
        self.decisions[last.placed_because] += 1
        if len(attempts) == 1:
            self.queue.observe(last.sent_at - last.queued_at)

    def note_first_token(self, attempts: Sequence[Attempt]) -> None:
        """The first token of the last attempt has come."""
        last = attempts[-1]
        wait = last.first_at - last.sent_at
        self.expected_wait.observe(last.expected_s)
        self.actual_wait.observe(wait)
        self.wait_error.observe(abs(wait - last.expected_s))
        if len(attempts) == 1:
            self.prefill.observe(wait)
        else:
            self._note_resumed(attempts[-2], last.first_at)

    def note_moved(self, cause: Cause) -> None:
        """A choice lost its place at a replica."""
        self.moved[cause] += 1

    def note_end(self, attempts: Sequence[Attempt], now: float, cached: int | None = None) -> None:
        """A choice has its last token; ``cached``: prompt tokens that its replica found in the cache, where the replica said so."""
        if not attempts:
            return
        last = attempts[-1]
        if (before := _interrupted(attempts)) is not None:
            self._note_resumed(before, now)
        if attempts[0].first_at:
            self.decode.observe(now - attempts[0].first_at)
        self.inference.observe(now - attempts[0].sent_at)
        if cached is not None and last.cached is not None:
            self.expected_hits += last.cached
            self.actual_hits += cached

    def note_failure(self, attempts: Sequence[Attempt]) -> None:
        """A choice failed; it counts here only if it had lost its place and no token has arrived since."""
        if (before := _interrupted(attempts)) is not None and before.cause:
            self.failed[before.cause] += 1

    def _note_resumed(self, before: Attempt, now: float) -> None:
        if before.cause:
            self.resumed[before.cause] += 1
            self.pause.observe(now - before.ended_at)


def _interrupted(attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt whose loss still interrupts a choice: the last one, or the previous one while the last has given no token."""
    if not attempts:
        return None
    if attempts[-1].cause:
        return attempts[-1]
    return attempts[-2] if len(attempts) > 1 and not attempts[-1].first_at else None
