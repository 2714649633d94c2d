"""Routing policies: which replica a choice is sent to. A file a policy; the table below names them all."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.router.core.policy.least_wait import LeastWait
from orchestrator.router.core.policy.routing_policy import Candidate, PlacementQuery, RoutingPolicy

POLICIES: dict[str, Callable[[], RoutingPolicy]] = {LeastWait.name: LeastWait}
DEFAULT_POLICY = LeastWait.name

__all__ = ["DEFAULT_POLICY", "POLICIES", "Candidate", "PlacementQuery", "RoutingPolicy"]
