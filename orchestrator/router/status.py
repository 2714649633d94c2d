"""Makes a router's status of its core's state. Owns nothing: every number is read when it is asked for."""

from __future__ import annotations

import msgspec

from orchestrator.router.core.replica_registry import Replica, ReplicaLoss
from orchestrator.router.core.router_core import RouterCore
from workers.protocol.status import ModelStatus, ReplicaLossStatus, ReplicaStatus, RouterStatus


def router_status(core: RouterCore, name: str, now: float) -> RouterStatus:
    """``name``: of the router; ``now``: seconds of the core's clock."""
    return RouterStatus(
        router=name,
        closing=core.closing,
        queue={model: core.waiting(model) for model in core.models},
        admitted={model: sum(stats.limits.counts) for model, stats in core.stats.items()},
        running=core.placed,
        counts=dict(core.counts),
        replicas=tuple(replica_status(replica, now) for replica in core.registry.replicas.values()),
        losses=tuple(_loss_status(loss, now) for loss in core.registry.losses),
    )


def model_status(core: RouterCore, name: str) -> ModelStatus | None:
    """What every ready replica of a model can do, or every lost one while none is ready. None for a name that is no model's."""
    if name not in core.models:
        return None
    known = [replica for replica in core.registry.replicas.values() if replica.model == name]
    ready = [replica for replica in known if replica.state == "ready"]
    capacities = [replica.capacity for replica in ready or known]
    return ModelStatus(
        name=name,
        ready=len(ready),
        max_seq_len=min((capacity.max_seq_len for capacity in capacities), default=0),
        vocab_size=min((capacity.vocab_size for capacity in capacities), default=0),
        block_size=min((capacity.block_size for capacity in capacities), default=0),
        guided=all(capacity.guided for capacity in capacities),
    )


def replica_status(replica: Replica, now: float) -> ReplicaStatus:
    """Without a heartbeat that counts, all blocks pass for free and every other number of a heartbeat for 0."""
    capacity, heartbeat = replica.capacity, replica.last_heartbeat
    status = ReplicaStatus(
        name=replica.name,
        model=replica.model,
        state=replica.state,
        reason=replica.reason or replica.quarantined,
        quarantined=bool(replica.quarantined),
        epoch=replica.epoch,
        age_s=round(now - replica.since, 3),
        tp=capacity.tp,
        pp=capacity.pp,
        engine=capacity.engine,
        dtype=capacity.dtype,
        resume=replica.resume,
        max_batch_size=capacity.max_batch_size,
        max_seq_len=capacity.max_seq_len,
        max_num_tokens=capacity.max_num_tokens,
        block_size=capacity.block_size,
        num_blocks=capacity.num_blocks,
        free_blocks=capacity.num_blocks,
        choices=len(replica.streams),
        paused=replica.paused,
        signal_age_s=round(now - replica.seen, 3),
        tok_s=round(replica.tok_s, 1),
    )
    if heartbeat is None:
        return status
    stats = heartbeat.stats
    return msgspec.structs.replace(
        status,
        reported=True,
        step=heartbeat.step,
        busy_ms=heartbeat.busy_ms,
        running=stats.running,
        waiting=stats.waiting,
        free_blocks=stats.free_blocks,
        step_ms=stats.step_ms,
        prefill_tokens=stats.prefill_tokens,
        prompt_tokens_total=stats.prompt_tokens_total,
        output_tokens_total=stats.output_tokens_total,
        prefix_queries_total=stats.prefix_queries_total,
        prefix_hits_total=stats.prefix_hits_total,
        preemptions_total=stats.preemptions_total,
        step_tokens=stats.step_tokens,
        step_tokens_total=stats.step_tokens_total,
    )


def _loss_status(loss: ReplicaLoss, now: float) -> ReplicaLossStatus:
    return ReplicaLossStatus(
        replica=loss.replica,
        model=loss.model,
        epoch=loss.epoch,
        reason=loss.reason,
        choices=loss.choices,
        drained=loss.drained,
        age_s=round(now - loss.at, 3),
    )
