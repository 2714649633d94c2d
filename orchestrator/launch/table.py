"""A deployment's status table, made of what the controller and the routers said. Owns nothing, asks nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from orchestrator.config import Config, ModelConfig
from orchestrator.core.reconcile import ReplicaView
from orchestrator.launch.control import DeploymentState, ModelRow, ReplicaRow, Status, UpdateReport
from orchestrator.launch.routers import RouterGroup, RouterReport
from workers.spec import Parallel


def describe(
    config: Config,
    views: Sequence[ReplicaView],
    routers: RouterGroup | None,
    *,
    models: Mapping[str, str],
    begun: float,
    stopping: bool,
    was_ready: bool,
    update: UpdateReport | None,
) -> Status:
    """``models``: replica -> model; ``begun``: Unix seconds. READY needs every replica and every router."""
    now = time.time()
    reports = routers.reports() if routers is not None else []
    by_name = {view.name: view for view in views}
    rows = tuple(_model(model, config, by_name, reports, begun, now, stopping, was_ready) for model in config.models)
    doors = routers is not None and routers.ready()
    states = {row.state for row in rows}
    state: DeploymentState
    if stopping:
        state = "DRAINING"
    elif states == {"READY"} and doors:
        state = "READY"
    elif "FAILED" in states:
        state = "FAILED" if states == {"FAILED"} else "DEGRADED"
    else:
        state = "DEGRADED" if was_ready else "STARTING"
    errors = [f"{view.name}: {view.cause}" for view in views if view.cause and view.phase not in ("ready", "draining")]
    return Status(
        name=config.name,
        state=state,
        age_s=now - begun,
        pid=os.getpid(),
        launcher=config.launcher,
        url=routers.url() if routers is not None else "",
        models=rows,
        routers=routers.pids() if routers is not None else {},
        rpc=routers.addresses() if routers is not None else (),
        run_dir=str(config.home),
        key_file=str(config.home / "keys" / "client-local.json"),
        error="; ".join(errors),
        update=update,
    )


def _model(
    model: ModelConfig,
    config: Config,
    views: Mapping[str, ReplicaView],
    reports: Sequence[RouterReport],
    begun: float,
    now: float,
    stopping: bool,
    was_ready: bool,
) -> ModelRow:
    gangs = model.gangs()
    rows = tuple(_replica(name, parallel, model.name, views.get(name), reports, begun, now) for name, parallel in gangs)
    ready = sum(row.state == "READY" for row in rows)
    state: DeploymentState
    if stopping:
        state = "DRAINING"
    elif ready == len(rows):
        state = "READY"
    elif all(row.state == "FAILED" for row in rows):
        state = "FAILED"
    elif any(row.state == "FAILED" for row in rows):
        state = "DEGRADED"
    else:
        state = "DEGRADED" if was_ready else "STARTING"
    return ModelRow(
        name=model.name,
        state=state,
        age_s=now - begun,
        replicas=len(rows),
        ready=ready,
        tp=tuple(sorted({parallel.tp for _, parallel in gangs})),
        pp=tuple(sorted({parallel.pp for _, parallel in gangs})),
        queue=sum(report.queue.get(model.name, 0) for report in reports),
        tok_s=sum(row.tok_s for row in rows),
        nodes=len({host for row in rows for host in row.hosts}),
        rows=rows,
    )


def _replica(
    name: str, parallel: Parallel, model: str, view: ReplicaView | None, reports: Sequence[RouterReport], begun: float, now: float
) -> ReplicaRow:
    if view is None:
        return ReplicaRow(name=name, model=model, state="PENDING", age_s=now - begun, tp=parallel.tp, pp=parallel.pp)
    gang = view.gang
    # Every router hears all of a replica's heartbeat, so one report is the whole truth about its load.
    here = [row for report in reports for row in report.replicas if row.name == name and row.epoch == view.epoch]
    load = here[0] if here else None
    placing = gang is not None and gang.phase == "placing"
    said = gang if gang is not None and (gang.cause or placing) else view
    state, cause, hint = view.phase.upper(), said.cause, said.hint
    if state == "READY" and any(row.quarantined for row in here):
        state, cause, hint = "QUARANTINED", "requests ended here by logits that are not finite", f"trireme drain {name} replaces it"
    return ReplicaRow(
        name=name,
        model=model,
        state=state,
        age_s=max(0.0, now - view.since),
        tp=parallel.tp,
        pp=parallel.pp,
        queue=load.waiting if load is not None else 0,
        running=load.running if load is not None else 0,
        tok_s=load.tok_s if load is not None else 0.0,
        nodes=len(gang.hosts) if gang is not None else 0,
        hosts=gang.hosts if gang is not None else (),
        epoch=view.epoch,
        restarts=view.failures,
        retry_in_s=max(0.0, view.due - now) if view.due else 0.0,
        cause=cause,
        hint=hint,
        pids=gang.pids if gang is not None else (),
        capacity=gang.capacity if gang is not None else None,
        log_dir=gang.log_dir if gang is not None else "",
    )
