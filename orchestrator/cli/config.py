"""`trireme config show`: what a deployment file means. Changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console, table

config = typer.Typer(name="config", cls=CommandGroup, help="What a deployment file means.", no_args_is_help=True)


@config.command("show")
def config_show(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Every value and where it came from.")] = False,
) -> None:
    """Check a deployment file and print what it means."""
    import yaml

    from orchestrator.config import deployment_file

    console: Console = context.obj
    found = deployment_file.load(file, env=os.environ)
    if resolved:
        rows = [[row.path, json.dumps(row.value), row.source] for row in found.rows()]
        console.out(table(["KEY", "VALUE", "SOURCE"], rows))
    else:
        console.out(yaml.safe_dump(deployment_file.as_tree(found.config), sort_keys=False), end="")
