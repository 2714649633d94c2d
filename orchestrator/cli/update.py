"""`trireme update`: applies a changed file to a running deployment. Owns only the command's output; the host makes the update
(:mod:`orchestrator.control.host.update`)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import asdict

from orchestrator.cli.console import Console
from orchestrator.cli.deployment_options import Launcher, LocationOptions, Port, Routers
from orchestrator.cli.option_structs import with_option_structs
from workers.protocol.errors import ReplicaLost

if TYPE_CHECKING:
    from orchestrator.control.host.control_socket import ControlClient, UpdateReport

POLL_S = 0.3


@with_option_structs
def update(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The deployment file, changed.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the moves and change nothing.")] = False,
    *,
    port: Port = None,
    routers: Routers = None,
    launcher: Launcher = None,
    location: LocationOptions,
) -> None:
    """Apply a changed file to a running deployment, one replica at a time, without a failed request. Repeat the flags of `up`."""
    from orchestrator.config import deployment_file as configs
    from orchestrator.control.host import control_socket
    from orchestrator.control.host import update as updates

    console: Console = context.obj
    flags = asdict(location) | {"port": port, "routers": routers, "launcher": launcher}
    resolved = configs.load(file, flags=flags, env=os.environ)
    control = control_socket.connect(resolved.config.name, resolved.config.run_dir)
    hardware = control.hardware()  # first, so that nothing is fetched if no deployment runs
    with console.progress() as progress:
        wanted = updates.prepare(resolved.config, hardware, progress)
    report = control.update(wanted, list(resolved.sources), dry_run=dry_run)
    if not report.moves:
        console.say(f"{wanted.name} runs this already")
    elif dry_run:
        console.out("\n".join(f"{index}. {move}" for index, move in enumerate(report.moves, 1)))
    else:
        follow(console, control)


def follow(console: Console, control: ControlClient) -> None:
    """Print each move when it ends. Raises :class:`ReplicaLost` if the update was rolled back."""
    printed, under_way = 0, ""
    while True:
        report = control.status().update
        assert report is not None
        for text, seconds in report.steps[printed:]:
            console.say(f"{text}: {seconds:.1f} s", kind="update", left=report.left)
        printed = len(report.steps)
        if report.phase == "returning" and under_way != report.error:
            under_way = report.error
            console.warn(f"taken back: {report.error}")
        if report.phase in ("done", "returned"):
            break
        time.sleep(POLL_S)
    conclude(console, control.name, report)


def conclude(console: Console, name: str, report: UpdateReport) -> None:
    if report.phase == "returned":
        raise ReplicaLost("the update was taken back", report.error, "what ran before serves again; fix the file and update again")
    console.say(f"{name} is updated, {report.seconds:.1f} s")
