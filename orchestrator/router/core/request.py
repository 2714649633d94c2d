"""The request that frontends submit to the routing core. Owns nothing: the struct is a fact, the core's records are elsewhere."""

from __future__ import annotations

import msgspec

from orchestrator.router.core.stats import Attempt
from workers.protocol.messages import UNLIMITED, SamplingParams


class RouterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One validated request: ``n`` choices of one prompt. ``params.seed`` is resolved; choice i uses ``seed + i`` (mod 2**63).

    ``client`` names the caller; ``tenant`` is who shares the queue in turn with others: the name of the caller's key, or its address.
    ``weight``: its share of the service beside those that weigh 1. Of the requests that wait, those of smaller ``priority`` go first.
    ``request_id`` is the id that the client sees, ``affinity`` is a session hint. ``emitted`` holds the tokens that the client already has
    of each choice (its journal), or is empty. Where a choice has a list there, the core appends to that very list just before each
    delivery, so that a frontend which needs the tokens reads them there and a token is stored once. ``attempts`` is the same for the
    attempts of a choice; ``client_attempt``: how often the client had gone to another router before. ``deadline_s``: seconds from now, None
    = none. ``marks``: the caller's request id and trace id, for log lines of replicas.
    """

    client: str
    request_id: str
    model: str
    prompt_ids: list[int]
    params: SamplingParams
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    n: int = 1
    salt: str = ""
    affinity: str = ""
    credit: int = UNLIMITED
    deadline_s: float | None = None
    emitted: list[list[int]] = []
    client_attempt: int = 0
    attempts: list[list[Attempt]] = []
    marks: tuple[str, str] = ("", "")
