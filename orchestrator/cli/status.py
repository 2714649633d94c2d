"""`trireme status`, `drain` and `down`: deployments of this user on this machine, through their control sockets. Owns only the tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Console, age, table
from workers.protocol.errors import NotFound, Rejected

if TYPE_CHECKING:
    from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
    from workers.protocol.status import DeploymentState

DEFAULT_RUN_DIR = "~/.local/state/trireme"
WATCH_S = 1.0
TROUBLED: tuple[DeploymentState, ...] = ("DEGRADED", "FAILED")
LOST = 5

Name = Annotated[str, typer.Argument(help="Which deployment; the only one when not given.")]
RunDir = Annotated[str, typer.Option("--run-dir", envvar="TRIREME_RUN_DIR", help="Where deployments keep their state.")]

MODELS = ["NAME", "STATE", "AGE", "REPLICAS", "READY", "TP", "PP", "QUEUE", "TOK/S", "NODES"]
REPLICAS = ["REPLICA", "STATE", "AGE", "TP", "PP", "RUNNING", "QUEUE", "TOK/S", "KV-TOKENS", "RESTARTS", "HOSTS", "PIDS"]


def running(run_dir: str) -> list[DeploymentStatus]:
    """Every deployment that answers, by name."""
    from orchestrator.control.host import deployment

    found = []
    for socket in sorted(Path(run_dir).expanduser().glob("*/control.sock")):
        try:
            found.append(deployment.connect(socket.parent.name, run_dir).status())
        except NotFound:
            continue  # it was killed: its socket is a leftover
    return found


def pick(name: str, run_dir: str) -> ControlClient:
    """The deployment that is meant. Raises :class:`NotFound` when none runs, :class:`Rejected` when several do and none was named."""
    from orchestrator.control.host import deployment

    if name:
        return deployment.connect(name, run_dir)
    names = [status.name for status in running(run_dir)]
    if not names:
        raise NotFound("no deployment runs", f"nothing answers under {run_dir}", "trireme up FILE, or trireme serve MODEL")
    if len(names) > 1:
        raise Rejected(f"{len(names)} deployments run", ", ".join(names), "name one")
    return deployment.connect(names[0], run_dir)


def status(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which deployment; all when not given.")] = "",
    form: Annotated[str, typer.Option("--output", "-o", metavar="wide|json|yaml", help="More columns, or everything.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second until Ctrl-C.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show deployments and their replicas. Exit code 5 when a replica is missing that was there, or failed for good."""
    console: Console = context.obj
    form = "json" if as_json else form
    if form not in ("", "wide", "json", "yaml"):
        raise Rejected(f"-o {form} is not a form", hint="use wide, json or yaml")
    while True:
        found = [pick(name, run_dir).status()] if name else running(run_dir)
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
    """The answer of `trireme status` in one of its forms."""
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
            f"{found.name}/{model.name}", model.state, age(model.age_s), str(model.replicas), str(model.ready), commas(model.tp),
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
        for row in model.rows
    ]  # fmt: skip


def commas(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values)) or "-"


def where(found: DeploymentStatus) -> list[str]:
    """Addresses, processes and files of one deployment."""
    lines = [f"{found.name}: {found.url or 'no HTTP door yet'}, host process {found.pid}, launcher {found.launcher}"]
    lines += [f"  router {name}: process {pid}" for name, pid in found.routers.items()]
    lines += [f"  rpc: {address.endpoint}" for address in found.rpc]
    return [*lines, f"  logs: {found.run_dir}"]


def drain(
    context: typer.Context,
    replica: Annotated[str, typer.Argument(help="Name of the replica, as `trireme status -o wide` shows it.")],
    name: Annotated[str, typer.Option("--name", help="Which deployment; the only one when not given.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Have one replica finish what it runs and be launched anew."""
    deployment, _, short = replica.rpartition("/")
    pick(name or deployment, run_dir).drain(short)
    context.obj.say(f"replica {short} drains; another takes its place")


def down(
    context: typer.Context,
    name: Name = "",
    now: Annotated[bool, typer.Option("--now", help="Do not wait for what runs.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Drain a deployment, stop it, and wait until its host process is gone."""
    control = pick(name, run_dir)
    started = time.monotonic()
    control.down(now=now)
    context.obj.say(f"{control.name} is down, {time.monotonic() - started:.1f} s")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (status, drain, down):
        app.command()(command)
