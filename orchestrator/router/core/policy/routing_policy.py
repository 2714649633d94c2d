"""The interface between the routing core and a routing policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from orchestrator.router.core.replica_registry import Kind
from orchestrator.router.core.stats import PlacementReason
from workers.protocol.messages import Capacity


class PlacementQuery(msgspec.Struct, frozen=True, kw_only=True):
    """The policy's view of the choice that waits for a replica.

    ``known_tokens``: tokens, prompt and output, that a replica must have computed before it decodes the next. ``cached_tokens[i]``: those
    of them that candidate i probably holds. ``session_replica``: where the choice's session ran last, empty if unknown.
    ``output_tokens``: usual length of an answer of this model.
    """

    model: str
    known_tokens: int
    cached_tokens: list[int]
    session_replica: str
    output_tokens: float


class Candidate(Protocol):
    """A replica with a free place, as a policy sees it; :class:`orchestrator.router.core.replica_registry.Replica` says what each means."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def capacity(self) -> Capacity: ...
    @property
    def step_ms(self) -> float: ...
    @property
    def occupancy(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def choice_ms(self) -> float: ...
    @property
    def last_sent(self) -> int: ...


class RoutingPolicy(Protocol):
    """Decides where choices go. Deterministic: a policy reads no clock and no random number, so that recorded events replay equally.

    A policy changes only what it learns from ``on_sent``, ``on_first_token`` and ``on_end``.
    """

    @property
    def name(self) -> str:
        """Its name in :data:`orchestrator.router.core.policy.POLICIES`."""

    def choose(self, query: PlacementQuery, candidates: Sequence[Candidate]) -> tuple[int, PlacementReason] | None:
        """The index of the candidate that the choice is sent to, and why; None = the choice waits. ``candidates`` is never empty."""

    def on_sent(self, query: PlacementQuery, replica: str) -> None:
        """The choice of ``query`` was sent to ``replica``."""

    def on_first_token(self, replica: str, wait_s: float) -> None:
        """The first token of an attempt at ``replica`` came ``wait_s`` after the choice was sent."""

    def on_end(self, replica: str, output_tokens: int) -> None:
        """A choice ended at ``replica``; its answer has ``output_tokens``."""
