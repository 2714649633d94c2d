"""`trireme doctor`, `trireme config show`, `trireme version`: what is here and what would be used. Changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.console import Console, table
from orchestrator.cli.options import CacheDir, cache_folder
from workers import __version__
from workers.protocol.errors import EnvironmentFault

STYLES = {"ok": "good", "warn": "warn", "fail": "bad"}

settings = typer.Typer(name="config", help="What a deployment file means.", no_args_is_help=True)


def version(context: typer.Context) -> None:
    """Print the version."""
    context.obj.out(f"trireme {__version__}")


def doctor(
    context: typer.Context,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The HTTP port that a deployment would use.")] = 8000,
    cache_dir: CacheDir = None,
) -> None:
    """Look at this machine: Python, torch, MPI, Ray, ports, memory, names. Exit code 4 when something must be mended first."""
    from orchestrator.cli import host_checks as looks

    console: Console = context.obj
    findings = looks.examine(port, cache_folder(cache_dir))
    rows = [[finding.name, finding.state.upper(), finding.found] for finding in findings]
    for line, finding in zip(table(["CHECK", "STATE", "FOUND"], rows).splitlines(), [None, *findings], strict=True):
        if finding is None:
            console.out(line)
            continue
        state = finding.state.upper()
        console.out(line.replace(f" {state} ", f" {console.paint(state, STYLES[finding.state])} ", 1))
    for finding in findings:
        if finding.hint:
            console.out(f"{console.paint('hint', 'hint')}: {finding.name}: {finding.hint}")
    if failed := [finding.name for finding in findings if finding.state == "fail"]:
        raise EnvironmentFault(f"this machine is not ready: {', '.join(failed)}", hint="the hints above say what to do")


@settings.command("show")
def config_show(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Every value and where it came from.")] = False,
) -> None:
    """Check a deployment file and print what it means."""
    import msgspec
    import yaml

    from orchestrator.config import deployment_file

    console: Console = context.obj
    found = deployment_file.load(file, env=os.environ)
    if resolved:
        rows = [[row.path, json.dumps(row.value), row.source] for row in found.rows()]
        console.out(table(["KEY", "VALUE", "SOURCE"], rows))
    else:
        console.out(yaml.safe_dump(msgspec.to_builtins(found.config), sort_keys=False), end="")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(doctor)
    app.add_typer(settings)
    app.command()(version)
