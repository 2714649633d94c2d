"""Routing policies: which replica a choice is sent to. One module a policy.

:data:`POLICIES` names them all; a dump keeps the name, so that its replay runs the same policy. No setting chooses one yet: every router
runs :data:`DEFAULT_POLICY`. A second policy needs its line in the table, and a field of the router's spec that
:class:`orchestrator.router.process.RouterProcess` passes to the routing core.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.router.core.policy.least_wait import LeastWait
from orchestrator.router.core.policy.routing_policy import Candidate, PlacementQuery, RoutingPolicy

POLICIES: dict[str, Callable[[], RoutingPolicy]] = {LeastWait.name: LeastWait}
DEFAULT_POLICY = LeastWait.name

__all__ = ["DEFAULT_POLICY", "POLICIES", "Candidate", "PlacementQuery", "RoutingPolicy"]
