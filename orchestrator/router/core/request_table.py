"""Where every live row of a router is: in its model's line, or on a stream at a replica; never both, never neither.

Owns the indexes by request and by stream, the lines, and the totals. Moves rows and decides nothing:
:mod:`orchestrator.router.core.transitions` says when, and tells replicas and doors.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.router.core.replica_registry import Replica, ReplicaRegistry
from orchestrator.router.core.request_state import ChoiceState, RequestState, WaitingQueue
from orchestrator.router.core.stats import Attempt, ModelStats


class RequestTable:
    """``counts``: totals since start, by event; a row counts as accepted once, and later as finished, failed or cancelled once.
    ``tallies``: what was measured, by model."""

    def __init__(self, models: Iterable[str]) -> None:
        self.lines: dict[str, WaitingQueue] = {name: WaitingQueue() for name in dict.fromkeys(models)}
        self.tallies: dict[str, ModelStats] = {name: ModelStats() for name in self.lines}
        self.requests: dict[int, RequestState] = {}
        self.streams: dict[int, ChoiceState] = {}
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "accepted", "finished", "failed", "cancelled", "resubmitted", "attached", "stale_tokens", "duplicate_tokens", "gaps",
                "replicas_lost", "quarantines", "refused_hellos", "unknown_speakers", "overloaded",
            ),
            0,
        )  # fmt: skip
        self._serial = 0

    def next(self) -> int:
        """A number that was never given before: ids of requests, rows and streams."""
        self._serial += 1
        return self._serial

    def find(self, replica: Replica, stream: int, attempt: int) -> ChoiceState | None:
        """The row on this stream, if the message is of its present placement."""
        row = self.streams.get(stream)
        return row if row is not None and row.attempt == attempt and row.replica is replica else None

    def place(self, row: ChoiceState, replica: Replica, placement: Attempt, now: float) -> None:
        """From its line to a new stream at ``replica``, as ``placement`` says."""
        self.lines[row.request.model].remove(row)
        row.stream = self.next()
        row.phase, row.replica, row.sent_at, row.held = "sent", replica, now, len(row.emitted)
        self.streams[row.stream] = row
        replica.streams[row.stream] = placement.tokens
        replica.own_tokens += placement.tokens
        replica.chosen = row.stream
        placement.attempt, placement.held = row.attempt, row.held
        placement.queued_at, placement.sent_at = row.queued_at, now
        row.trail.append(placement)
        self.tallies[row.request.model].placed(row.trail)
        self.settle(row)

    def began(self, row: ChoiceState, now: float) -> None:
        """The first tokens since it was sent are here, so its prompt is computed."""
        replica = row.replica
        assert replica is not None
        row.phase = "running"
        replica.own_tokens -= replica.streams[row.stream]
        replica.streams[row.stream] = 0
        self.tallies[row.request.model].began(row.trail, now)

    def settle(self, row: ChoiceState) -> None:
        """Note whether a placed row's client takes anything now; call it when its credit ends or comes again."""
        starved = row.credit <= 0
        if row.replica is not None and starved != row.starved:
            row.starved = starved
            row.replica.paused += 1 if starved else -1

    def restream(self, row: ChoiceState, now: float) -> None:
        """To another stream at the same replica."""
        replica = row.replica
        assert replica is not None
        tokens = replica.streams.pop(row.stream)
        del self.streams[row.stream]
        row.stream = self.next()
        self.streams[row.stream], replica.streams[row.stream] = row, tokens
        row.phase, row.sent_at = "sent", now

    def release(self, row: ChoiceState) -> Replica | None:
        """Out of its place; returns the replica that still works on it."""
        replica = row.replica
        if replica is None:
            self.lines[row.request.model].remove(row)
            return None
        del self.streams[row.stream]
        replica.own_tokens -= replica.streams.pop(row.stream)
        replica.paused -= row.starved
        row.replica, row.starved = None, False
        return replica

    def requeue(self, row: ChoiceState, now: float) -> None:
        """A released row goes to the front of its line."""
        row.phase, row.queued_at = "queued", now
        self.lines[row.request.model].push_front(row)

    def end(self, row: ChoiceState, how: str) -> None:
        """A released row is over; its request too, if it was the last."""
        row.phase = "ended"
        self.counts[how] += 1
        row.request.live -= 1
        if not row.request.live:
            del self.requests[row.request.id]

    def check(self, fleet: ReplicaRegistry) -> None:
        """Assert that every live row is in exactly one place and that every index agrees."""
        fleet.check()
        rows = 0
        for request in self.requests.values():
            live = [row for row in request.rows if row.phase != "ended"]
            assert live and request.live == len(live), f"request {request.id}: live count"
            rows += len(live)
            for row in live:
                queued = row in self.lines[request.model]
                assert queued == (row.phase == "queued"), f"row {row.id}: {row.phase} but queued={queued}"
                assert (row.replica is None) == queued, f"row {row.id}: a place and a queue"
                if row.replica is not None:
                    assert self.streams.get(row.stream) is row and row.stream in row.replica.streams, f"row {row.id}: stream"
                    assert row.starved == (row.credit <= 0), f"row {row.id}: paused or not"
                    assert row.replica.state != "lost" and fleet.replicas.get(row.replica.name) is row.replica
        queued_rows = sum(map(len, self.lines.values()))
        assert rows == len(self.streams) + queued_rows, "a row is in no place or in two"
        assert len(self.streams) == sum(len(replica.streams) for replica in fleet.replicas.values()), "placements differ"
        for replica in fleet.replicas.values():
            assert replica.own_tokens == sum(replica.streams.values()), f"replica {replica.name}: prompt tokens"
        assert sum(row.starved for row in self.streams.values()) == sum(replica.paused for replica in fleet.replicas.values()), "paused"
        ended = self.counts["finished"] + self.counts["failed"] + self.counts["cancelled"]
        assert self.counts["accepted"] == ended + rows, "a row ended twice or never"
        for model, tally in self.tallies.items():
            for cause, moved in tally.moved.items():
                assert tally.resumed[cause] + tally.failed[cause] <= moved, f"{model}: more came of rows that moved ({cause}) than did"
