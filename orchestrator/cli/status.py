"""`trireme status`: deployments of this user on this machine and their replicas. Owns only the tables."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Console, age, table
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir, find_running, pick
from workers.protocol.errors import Rejected

if TYPE_CHECKING:
    from orchestrator.control.host.control_socket import DeploymentStatus
    from workers.protocol.status import DeploymentState

WATCH_S = 1.0
TROUBLED: tuple[DeploymentState, ...] = ("DEGRADED", "FAILED")
LOST = 5
MODELS = ["NAME", "STATE", "AGE", "REPLICAS", "READY", "TP", "PP", "QUEUE", "TOK/S", "NODES"]
REPLICAS = ["REPLICA", "STATE", "AGE", "TP", "PP", "RUNNING", "QUEUE", "TOK/S", "KV-TOKENS", "RESTARTS", "HOSTS", "PIDS"]


def status(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the deployment; by default all.")] = "",
    form: Annotated[str, typer.Option("--output", "-o", metavar="wide|json|yaml", help="More columns, or everything.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat every second until Ctrl-C.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show deployments and their replicas. Exit code 5 if a replica is lost or failed permanently."""
    console: Console = context.obj
    form = "json" if as_json else form
    if form not in ("", "wide", "json", "yaml"):
        raise Rejected(f"-o {form} is not a form", hint="use wide, json or yaml")
    while True:
        found = [pick(name, run_dir).status()] if name else find_running(run_dir)
        if not found and not watch:
            pick("", run_dir)
        if watch and console.colours(console.stdout):
            console.out("\x1b[H\x1b[2J", end="")
        console.out(render(found, form))
        if not watch:
            break
        time.sleep(WATCH_S)
    if any(one.state in TROUBLED for one in found):
        raise typer.Exit(LOST)


def render(found: list[DeploymentStatus], form: str) -> str:
    """The output of `trireme status` in one of its formats."""
    if form in ("json", "yaml"):
        import msgspec
        import yaml

        data = msgspec.to_builtins(found)
        return json.dumps(data, indent=2) if form == "json" else yaml.safe_dump(data, sort_keys=False).rstrip()
    blocks = [table(MODELS, [row for one in found for row in model_rows(one)])]
    if form == "wide":
        blocks.append(table(REPLICAS, [row for one in found for row in replica_rows(one)]))
        blocks += ["\n".join(where(one)) for one in found]
    blocks += [f"{one.name}: {one.error}" for one in found if one.error]
    blocks += [f"{one.name}: update: {one.update.doing}, {one.update.left} of {len(one.update.moves)} moves left"
               for one in found if one.update is not None and one.update.left]  # fmt: skip
    return "\n\n".join(blocks)


def model_rows(found: DeploymentStatus) -> list[list[str]]:
    return [
        [
            f"{found.name}/{model.name}", model.state, age(model.age_s), str(model.wanted), str(model.ready), commas(model.tp),
            commas(model.pp), str(model.queue), f"{model.tok_s:.1f}", str(model.nodes),
        ]
        for model in found.models
    ]  # fmt: skip


def replica_rows(found: DeploymentStatus) -> list[list[str]]:
    return [
        [
            f"{found.name}/{row.name}", row.state, age(row.age_s), str(row.tp), str(row.pp), str(row.running), str(row.queue),
            f"{row.tok_s:.1f}", str(row.capacity.block_size * row.capacity.num_blocks) if row.capacity else "-", str(row.restarts),
            commas(row.hosts), commas(tuple(pid for _, _, pid in row.pids)),
        ]
        for model in found.models
        for row in model.replicas
    ]  # fmt: skip


def commas(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values)) or "-"


def where(found: DeploymentStatus) -> list[str]:
    """Addresses, processes and files of one deployment."""
    lines = [f"{found.name}: {found.url or 'no HTTP API yet'}, host process {found.pid}, launcher {found.launcher}"]
    lines += [f"  router {name}: process {pid}" for name, pid in found.routers.items()]
    lines += [f"  rpc: {address.endpoint}" for address in found.rpc]
    return [*lines, f"  logs: {found.run_dir}"]
