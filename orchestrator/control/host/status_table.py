"""A deployment's status table, made of what the controller and the routers said. Owns nothing, asks nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import msgspec

from orchestrator.config.deployment_file import Config, ModelConfig
from orchestrator.control.host.control_socket import DeploymentState, DeploymentStatus, ModelRow, ReplicaRow, UpdateReport
from orchestrator.control.host.router_poller import ReplicaReport, RouterReport, RouterSource
from orchestrator.control.reconciler import ReplicaView
from workers.protocol.specs import Parallel


def describe(
    config: Config,
    views: Sequence[ReplicaView],
    routers: RouterSource | None,
    *,
    models: Mapping[str, str],
    begun: float,
    stopping: bool,
    was_ready: bool,
    update: UpdateReport | None,
) -> DeploymentStatus:
    """``models``: replica -> model; ``begun``: Unix seconds. READY needs every replica and every router; at routers of others, every
    replica and its acceptance by each of them that answers."""
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
    errors += [f"{row.name}: {row.cause}" for model in rows for row in model.rows if row.state == "JOINING"]
    return _status(config, routers, state, rows, begun=begun, error="; ".join(errors), update=update)


def describe_standing(
    config: Config,
    views: Sequence[ReplicaView],
    routers: RouterSource | None,
    *,
    models: Mapping[str, str],
    begun: float,
    stopping: bool,
    was_ready: bool,
    update: UpdateReport | None,
) -> DeploymentStatus:
    """As :func:`describe`, for routers alone: READY needs their doors, and that others were told of them (``was_ready``). The replicas are
    those that joined, in the routers' eyes."""
    now = time.time()
    reports = routers.reports() if routers is not None else []
    doors = routers is not None and routers.ready()
    state: DeploymentState = "DRAINING" if stopping else "READY" if doors and was_ready else "DEGRADED" if was_ready else "STARTING"
    rows = tuple(_joined_model(model, reports, state, now - begun) for model in config.models)
    made = _status(config, routers, state, rows, begun=begun, error="", update=None)
    return msgspec.structs.replace(made, launcher="none")


def _status(
    config: Config,
    routers: RouterSource | None,
    state: DeploymentState,
    rows: tuple[ModelRow, ...],
    *,
    begun: float,
    error: str,
    update: UpdateReport | None,
) -> DeploymentStatus:
    return DeploymentStatus(
        name=config.name,
        state=state,
        age_s=time.time() - begun,
        pid=os.getpid(),
        launcher=config.launcher,
        url=routers.url() if routers is not None else "",
        models=rows,
        routers=routers.pids() if routers is not None else {},
        rpc=routers.addresses() if routers is not None else (),
        run_dir=str(config.home),
        key_file=str(routers.key_file) if routers is not None else "",
        error=error,
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
    joins = bool(config.join.file)
    rows = tuple(_replica(name, parallel, model.name, views.get(name), reports, begun, now, joins=joins) for name, parallel in gangs)
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
        admitted=sum(report.admitted.get(model.name, 0) for report in reports),
        tok_s=sum(row.tok_s for row in rows),
        nodes=len({host for row in rows for host in row.hosts}),
        rows=rows,
    )


def _joined_model(model: ModelConfig, reports: Sequence[RouterReport], state: DeploymentState, age_s: float) -> ModelRow:
    """Of a replica that several routers know, what the one says that thinks best of it."""
    best: dict[str, ReplicaReport] = {}
    for row in (row for report in reports for row in report.replicas if row.model == model.name):
        if row.name not in best or (row.epoch, row.state != "lost") > (best[row.name].epoch, best[row.name].state != "lost"):
            best[row.name] = row
    rows = tuple(
        ReplicaRow(
            name=row.name, model=model.name, state=row.state.upper(), age_s=row.age_s, tp=row.tp, pp=row.pp, queue=row.waiting,
            running=row.running, tok_s=row.tok_s, epoch=row.epoch, cause=row.reason,
        )
        for row in best.values()
    )  # fmt: skip
    living = [row for row in rows if row.state != "LOST"]
    ready = sum(row.state == "READY" for row in living)
    return ModelRow(
        name=model.name,
        state="DEGRADED" if state == "READY" and not ready else state,
        age_s=age_s,
        replicas=len(living),
        ready=ready,
        tp=tuple(sorted({row.tp for row in living})),
        pp=tuple(sorted({row.pp for row in living})),
        queue=sum(report.queue.get(model.name, 0) for report in reports),
        tok_s=sum(row.tok_s for row in rows),
        nodes=0,
        rows=rows,
    )


def _replica(
    name: str,
    parallel: Parallel,
    model: str,
    view: ReplicaView | None,
    reports: Sequence[RouterReport],
    begun: float,
    now: float,
    *,
    joins: bool,
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
    if state == "READY" and joins and not _accepted(here, reports):
        state, cause, hint = "JOINING", "the routers have not accepted it", "is its pass still on their list? trireme keys show, there"
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
        kv_use=1.0 - load.free_blocks / load.num_blocks if load is not None and load.num_blocks and load.state != "lost" else 0.0,
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


def _accepted(rows: Sequence[ReplicaReport], reports: Sequence[RouterReport]) -> bool:
    """Whether every router that answers, of which there is one, has the replica among those that it sends requests to."""
    return bool(reports) and len(rows) == len(reports) and all(row.state == "ready" for row in rows)
