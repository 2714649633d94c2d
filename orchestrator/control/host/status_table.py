"""A deployment's status table, computed from the last reports of the controller and the routers. Owns nothing and sends no request.

The words for states are those of :mod:`workers.protocol.status`: a replica's row shows the reconciler's phase by ``ROW_STATES``. A row that
would be READY is QUARANTINED while a router has the replica in quarantine, and JOINING until every external router has accepted it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence, Set

import msgspec

from orchestrator.config.deployment_file import Config, ModelConfig
from orchestrator.control.host.control_socket import DeploymentStatus, ModelRow, ReplicaRow, UpdateReport
from orchestrator.control.host.router_source import RouterSource
from orchestrator.control.reconciler import ReplicaView
from workers.protocol.specs import Parallel
from workers.protocol.status import ROW_STATES, DeploymentState, ReplicaRowState, ReplicaStatus, RouterStatus

#: The load of a replica that no router reports.
_NO_LOAD = ReplicaStatus(name="", model="", state="lost")


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the host process. ``started_at``: Unix seconds; ``was_ready``: the deployment has been READY once."""

    started_at: float
    stopping: bool
    was_ready: bool
    update: UpdateReport | None = None


def describe(
    config: Config, views: Sequence[ReplicaView], layouts: Mapping[str, Parallel], routers: RouterSource | None, facts: HostFacts
) -> DeploymentStatus:
    """``layouts``: of the replicas whose layout is decided, by name. READY needs every replica and every router; with external routers,
    every replica must be accepted by each router that answers."""
    now = time.time()
    reports = routers.reports() if routers is not None else []
    by_name = {view.name: view for view in views}
    models = tuple(_model(model, config, by_name, layouts, reports, facts, now) for model in config.models)
    serving = routers is not None and routers.ready()
    state = _overall({model.state for model in models}, facts, complete=serving)
    errors = [f"{view.name}: {view.cause}" for view in views if view.cause and view.phase not in ("ready", "draining")]
    errors += [f"{row.name}: {row.cause}" for model in models for row in model.replicas if row.state == "JOINING"]
    return _status(config, routers, state, models, facts, launcher=config.launcher, error="; ".join(errors))


def describe_routers_only(config: Config, routers: RouterSource | None, facts: HostFacts) -> DeploymentStatus:
    """As :func:`describe`, for a deployment without replicas of its own: READY once its routers serve and their join
    file is written (``was_ready``). The replicas are those that joined, according to the routers."""
    reports = routers.reports() if routers is not None else []
    serving = routers is not None and routers.ready()
    state: DeploymentState = (
        "DRAINING" if facts.stopping else "READY" if serving and facts.was_ready else "DEGRADED" if facts.was_ready else "STARTING"
    )
    models = tuple(_joined_model(model, reports, state, time.time() - facts.started_at) for model in config.models)
    return _status(config, routers, state, models, facts, launcher="none", error="")


def _overall(states: Set[ReplicaRowState | DeploymentState], facts: HostFacts, *, complete: bool = True) -> DeploymentState:
    """The state of a whole from the states of its parts; ``complete`` False: something else is missing."""
    if facts.stopping:
        return "DRAINING"
    if states == {"READY"} and complete:
        return "READY"
    if states == {"FAILED"}:
        return "FAILED"
    return "DEGRADED" if facts.was_ready or "FAILED" in states else "STARTING"


def _status(
    config: Config,
    routers: RouterSource | None,
    state: DeploymentState,
    models: tuple[ModelRow, ...],
    facts: HostFacts,
    *,
    launcher: str,
    error: str,
) -> DeploymentStatus:
    return DeploymentStatus(
        name=config.name,
        state=state,
        age_s=time.time() - facts.started_at,
        pid=os.getpid(),
        launcher=launcher,
        url=routers.url() if routers is not None else "",
        models=models,
        routers=routers.pids() if routers is not None else {},
        rpc=routers.addresses() if routers is not None else (),
        run_dir=str(config.home),
        key_file=str(routers.key_file) if routers is not None else "",
        error=error,
        update=facts.update,
    )


def _model(
    model: ModelConfig, config: Config, views: Mapping[str, ReplicaView], layouts: Mapping[str, Parallel], reports: Sequence[RouterStatus],
    facts: HostFacts, now: float,
) -> ModelRow:  # fmt: skip
    gangs = [(gang.name, layouts.get(gang.name) or gang.layout or gang.with_tp(1)) for gang in model.gangs()]
    joins = bool(config.join.file)
    rows = tuple(
        _replica(model.name, parallel, view, reports, now, joins=joins)
        if (view := views.get(name)) is not None
        else ReplicaRow(name=name, model=model.name, state="PENDING", age_s=now - facts.started_at, tp=parallel.tp, pp=parallel.pp)
        for name, parallel in gangs
    )
    return ModelRow(
        name=model.name,
        state=_overall({row.state for row in rows}, facts),
        age_s=now - facts.started_at,
        wanted=len(rows),
        ready=sum(row.state == "READY" for row in rows),
        tp=tuple(sorted({parallel.tp for _, parallel in gangs})),
        pp=tuple(sorted({parallel.pp for _, parallel in gangs})),
        queue=sum(report.queue.get(model.name, 0) for report in reports),
        admitted=sum(report.admitted.get(model.name, 0) for report in reports),
        tok_s=sum(row.tok_s for row in rows),
        nodes=len({host for row in rows for host in row.hosts}),
        replicas=rows,
    )


def _joined_model(model: ModelConfig, reports: Sequence[RouterStatus], state: DeploymentState, age_s: float) -> ModelRow:
    """If several routers know a replica, the newest epoch counts, and for one epoch a router that has not lost it."""
    best: dict[str, ReplicaStatus] = {}
    for seen in (seen for report in reports for seen in report.replicas if seen.model == model.name):
        if seen.name not in best or (seen.epoch, seen.state != "lost") > (best[seen.name].epoch, best[seen.name].state != "lost"):
            best[seen.name] = seen
    rows = tuple(
        ReplicaRow(
            name=seen.name, model=model.name, state=ROW_STATES[seen.state], age_s=seen.age_s, tp=seen.tp, pp=seen.pp, queue=seen.waiting,
            running=seen.running, tok_s=seen.tok_s, epoch=seen.epoch, cause=seen.reason,
        )
        for seen in best.values()
    )  # fmt: skip
    living = [row for row in rows if row.state != "LOST"]
    ready = sum(row.state == "READY" for row in living)
    return ModelRow(
        name=model.name,
        state="DEGRADED" if state == "READY" and not ready else state,
        age_s=age_s,
        wanted=len(living),
        ready=ready,
        tp=tuple(sorted({row.tp for row in living})),
        pp=tuple(sorted({row.pp for row in living})),
        queue=sum(report.queue.get(model.name, 0) for report in reports),
        tok_s=sum(row.tok_s for row in rows),
        nodes=0,
        replicas=rows,
    )


def _replica(model: str, parallel: Parallel, view: ReplicaView, reports: Sequence[RouterStatus], now: float, *, joins: bool) -> ReplicaRow:
    gang = view.gang
    seen = [replica for report in reports for replica in report.replicas if replica.name == view.name and replica.epoch == view.epoch]
    # Every router gets all of a replica's heartbeats, so one report describes the whole load.
    load = seen[0] if seen else _NO_LOAD
    state, cause, hint = _row_state(view, seen, accepted=not joins or _accepted(seen, reports))
    return ReplicaRow(
        name=view.name,
        model=model,
        state=state,
        age_s=max(0.0, now - view.since),
        tp=parallel.tp,
        pp=parallel.pp,
        queue=load.waiting,
        running=load.running,
        tok_s=load.tok_s,
        kv_use=1.0 - load.free_blocks / load.num_blocks if load.num_blocks and load.state != "lost" else 0.0,
        nodes=len(gang.hosts) if gang is not None else 0,
        hosts=gang.hosts if gang is not None else (),
        epoch=view.epoch,
        restarts=view.restarts,
        failures=view.failures,
        retry_in_s=max(0.0, view.due - now) if view.due else 0.0,
        cause=cause,
        hint=hint,
        pids=gang.pids if gang is not None else (),
        capacity=gang.capacity if gang is not None else None,
        log_dir=gang.log_dir if gang is not None else "",
    )


def _row_state(view: ReplicaView, seen: Sequence[ReplicaStatus], *, accepted: bool) -> tuple[ReplicaRowState, str, str]:
    """(state, cause, hint). ``seen``: the gang as each router sees it; ``accepted``: no router still has to accept it."""
    quarantined = next((replica for replica in seen if replica.quarantined), None)
    if view.phase == "ready" and quarantined is not None:
        return "QUARANTINED", quarantined.reason, f"trireme drain {view.name} replaces it"
    if view.phase == "ready" and not accepted:
        return "JOINING", "the routers have not accepted it", "is its pass still on their list? trireme keys show, there"
    # A living gang's own cause is the most precise one.
    source = view.gang if view.gang is not None and (view.gang.cause or view.gang.phase == "placing") else view
    return ROW_STATES[view.phase], source.cause, source.hint


def _accepted(seen: Sequence[ReplicaStatus], reports: Sequence[RouterStatus]) -> bool:
    """Whether at least one router answers and every router that answers sends requests to the replica."""
    return bool(reports) and len(seen) == len(reports) and all(replica.state == "ready" for replica in seen)
