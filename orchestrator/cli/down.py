"""`trireme down`: a deployment is drained and stopped."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir, pick


def down(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the deployment; needed if several run.")] = "",
    now: Annotated[bool, typer.Option("--now", help="Do not wait for running requests.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Drain a deployment, stop it, and wait until its host process is gone."""
    control = pick(name, run_dir)
    started = time.monotonic()
    control.down(now=now)
    context.obj.say(f"{control.name} is down, {time.monotonic() - started:.1f} s")
