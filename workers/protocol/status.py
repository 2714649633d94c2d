"""Status reports of engines, replicas and routers, and the words for every kind of state.

Owns the structs and the words; no process state, no clock. All readers of status use them: the router's ``/status``, ``/metrics`` and
``/ui/data``, the host process that asks its routers, ``trireme status`` and ``trireme top``.

Each kind of state has one set of words, and one process that writes it:

    RankPhase          rank 0 of a gang, in its state file
    GangPhase          the launcher: the phases of the ranks, and ``placing`` before there are any
    ReplicaPhase       the reconciler: the phases of the gang, ``pending`` before the first launch, ``backoff`` before the next one
    RoutingState       one router: whether it sends requests to the replica
    ReplicaRowState    the host process, for people: made of the two sets above by :data:`ROW_STATES`, and two words of its own
    DeploymentState    the host process: one model, or the whole deployment
    UpdatePhase        the rollout of an update
    RouterPhase        a router process, in its state file
    RouterHealthState  a router's status page
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from workers.protocol.specs import ResumeClass

RankPhase = Literal["starting", "loading", "ready", "draining", "stopped", "failed"]
GangPhase = Literal["placing", RankPhase]
ReplicaPhase = Literal["pending", "backoff", GangPhase]
RoutingState = Literal["ready", "draining", "lost"]
#: QUARANTINED: routers send it only requests that no other replica can run. JOINING: it is ready, but an external router has not accepted
#: it yet.
ReplicaRowState = Literal[
    "PENDING", "BACKOFF", "PLACING", "STARTING", "LOADING", "READY", "DRAINING", "STOPPED", "FAILED", "LOST", "QUARANTINED", "JOINING"
]
DeploymentState = Literal["STARTING", "READY", "DEGRADED", "DRAINING", "FAILED"]
UpdatePhase = Literal["rolling", "returning", "done", "returned"]
RouterPhase = Literal["starting", "serving", "draining", "stopped"]
RouterHealthState = Literal["STARTING", "READY", "DEGRADED", "UNAVAILABLE", "DRAINING"]

#: The words of a status table for the phases of the reconciler and the states of a router.
ROW_STATES: Mapping[ReplicaPhase | RoutingState, ReplicaRowState] = {
    "pending": "PENDING",
    "backoff": "BACKOFF",
    "placing": "PLACING",
    "starting": "STARTING",
    "loading": "LOADING",
    "ready": "READY",
    "draining": "DRAINING",
    "stopped": "STOPPED",
    "failed": "FAILED",
    "lost": "LOST",
}


#: Counts and measurements: never negative, bounded, and no NaN.
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e9)]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's counts: sequences, blocks and prompt tokens now, and totals since the start of the process (``*_total``).

    ``prefill_tokens``: prompt tokens that are not computed yet. ``step_ms``: present duration of a step. ``step_tokens``: steps by the
    number of tokens that they computed, one count for each of :data:`~workers.protocol.messages.STEP_TOKEN_BUCKETS` and one beyond them;
    empty if the engine does not report it. ``prefixes``: hashes (:func:`workers.scheduler.block_pool.prefix_hashes`) of blocks that are
    certainly in the cache, parents first, from an engine whose cache the router cannot predict.
    """

    running: Count = 0
    waiting: Count = 0
    free_blocks: Count = 0
    prefill_tokens: Count = 0
    step_ms: Milliseconds = 0.0
    prompt_tokens_total: Count = 0
    output_tokens_total: Count = 0
    prefix_queries_total: Count = 0
    prefix_hits_total: Count = 0
    preemptions_total: Count = 0
    step_tokens: Annotated[list[Count], Meta(max_length=64)] = []
    step_tokens_total: Count = 0
    prefixes: Annotated[list[int], Meta(max_length=4096)] = []


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as one router knows it: its state, the facts of its Hello, and the counts of its last heartbeat. ``reason``: why it is
    lost, or in quarantine.

    ``age_s``: seconds in this state; ``signal_age_s``: seconds since its last message. ``choices``: this router's choices at the replica;
    ``paused``: those without credit. ``reported`` False: there is no valid heartbeat, and everything after ``tok_s`` is 0.
    """

    name: str
    model: str
    state: RoutingState
    reason: str = ""
    quarantined: bool = False
    epoch: int = 0
    age_s: float = 0.0
    tp: int = 1
    pp: int = 1
    engine: str = ""
    dtype: str = ""
    resume: ResumeClass = "valid"
    max_batch_size: int = 0
    max_seq_len: int = 0
    max_num_tokens: int = 0
    block_size: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    choices: int = 0
    paused: int = 0
    signal_age_s: float = 0.0
    reported: bool = False
    tok_s: float = 0.0
    running: int = 0
    waiting: int = 0
    step: int = 0
    busy_ms: float = 0
    step_ms: float = 0
    prefill_tokens: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    preemptions_total: int = 0
    step_tokens: list[int] | Literal[0] = 0
    step_tokens_total: int = 0


class ReplicaLossStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that a router lost ``age_s`` seconds ago. ``choices``: number of the router's choices that ran there; ``drained``: it left
    on purpose."""

    replica: str
    model: str
    epoch: int
    reason: str
    choices: int
    drained: bool
    age_s: float


class RpcStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A router's RPC server: number of live requests, and of frames refused since its start."""

    live: int
    malformed: int


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The status of one router. By model: ``queue``, choices that wait for a replica; ``admitted``, requests since the router's start.

    ``running``: choices at replicas. ``counts``: the routing core's counters since its start, by event. ``default_sampling_params``: the
    models' own defaults of requests, by model; only in answers of the HTTP API and the RPC server. ``rpc``: only in the answer to an RPC
    client.
    """

    router: str
    closing: bool = False
    queue: dict[str, int] = {}
    admitted: dict[str, int] = {}
    running: int = 0
    counts: dict[str, int] = {}
    replicas: tuple[ReplicaStatus, ...] = ()
    losses: tuple[ReplicaLossStatus, ...] = ()
    default_sampling_params: dict[str, dict[str, float]] | msgspec.UnsetType = msgspec.UNSET
    rpc: RpcStatus | msgspec.UnsetType = msgspec.UNSET


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The common limits of all ready replicas of a model; the numbers are 0 before the first replica was seen."""

    name: str
    ready: int
    max_seq_len: int
    vocab_size: int
    block_size: int
    guided: bool


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    """A router process's state file. ``http``: URL, empty while the HTTP server does not listen; ``back`` and ``rpc``: bound endpoints."""

    name: str
    pid: int
    phase: RouterPhase
    http: str
    back: str
    rpc: str
