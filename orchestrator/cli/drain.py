"""`trireme drain`: one replica finishes its running requests and is launched again."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir, pick


def drain(
    context: typer.Context,
    replica: Annotated[str, typer.Argument(help="Name of the replica, as `trireme status -o wide` shows it.")],
    name: Annotated[str, typer.Option("--name", help="Name of the deployment; needed if several run.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Let one replica finish its running requests, then launch it again."""
    deployment, _, short = replica.rpartition("/")
    pick(name or deployment, run_dir).drain(short)
    context.obj.say(f"replica {short} drains; another takes its place")
