"""The policy ``least_wait``: it picks the replica with the shortest expected wait, taking cached prefixes into account. Owns no state."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from orchestrator.router.core.policy.routing_policy import Candidate, PlacementQuery
from orchestrator.router.core.replica_registry import Kind
from orchestrator.router.core.stats import PlacementReason
from orchestrator.router.core.wait_estimate import expected_wait_ms


class LeastWait:
    """The session's last replica gets an advantage of one step; among equal replicas the least recently used one wins."""

    name = "least_wait"

    def choose(self, query: PlacementQuery, candidates: Sequence[Candidate]) -> tuple[int, PlacementReason] | None:
        if len(candidates) == 1:
            return 0, "only"
        best, best_key = 0, (inf, 0)
        step_lengths = _step_lengths(candidates)
        for index, replica in enumerate(candidates):
            step_ms = step_lengths[replica.kind]
            wait = expected_wait_ms(
                step_ms=step_ms,
                occupancy=replica.occupancy,
                max_batch_size=replica.capacity.max_batch_size,
                step_tokens=replica.capacity.max_num_tokens,
                queued_tokens=replica.queued_tokens,
                known_tokens=query.known_tokens,
                cached_tokens=query.cached_tokens[index],
                choice_ms=replica.choice_ms,
                output_tokens=query.output_tokens,
            )
            head_start = step_ms if replica.name == query.session_replica else 0.0
            key = (wait - head_start, replica.last_sent)
            if key < best_key:
                best, best_key = index, key
        if candidates[best].name == query.session_replica:
            return best, "session"
        return best, "prefix" if query.cached_tokens[best] else "load"

    def on_sent(self, query: PlacementQuery, replica: str) -> None:
        """Nothing is learnt: the candidates contain their load."""

    def on_first_token(self, replica: str, wait_s: float) -> None:
        """Nothing is learnt."""

    def on_end(self, replica: str, output_tokens: int) -> None:
        """Nothing is learnt."""


def _step_lengths(replicas: Sequence[Candidate]) -> dict[Kind, float]:
    """Usual length of a step of each kind of replica, ms.

    One length for all replicas of a kind: among equal replicas, the length of recent steps depends on their contents (a prompt or single
    tokens), and the replica that looked faster would get a whole burst. A replica that is really slower keeps its choices longer, and so
    gets fewer. A kind that has run nothing yet counts as fast as the others.
    """
    steps: dict[Kind, list[float]] = {}
    for replica in replicas:
        known = steps.setdefault(replica.kind, [])
        if replica.step_ms:
            known.append(replica.step_ms)
    lengths = {kind: sum(known) / len(known) for kind, known in steps.items() if known}
    typical = sum(lengths.values()) / len(lengths) if lengths else 1.0
    return {kind: max(0.1, lengths.get(kind, typical)) for kind in steps}
