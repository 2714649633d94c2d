"""`trireme config`: shows the settings of a deployment file, and writes the shipped examples. Changes no deployment."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console, table
from workers.protocol.errors import EnvironmentFault, Rejected

config = typer.Typer(name="config", cls=CommandGroup, help="Check deployment files, and write the shipped examples.", no_args_is_help=True)


@config.command("show")
def config_show(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Every value and where it came from.")] = False,
) -> None:
    """Check a deployment file and print its settings."""
    import yaml

    from orchestrator.config import deployment_file

    console: Console = context.obj
    found = deployment_file.load(file, env=os.environ)
    if resolved:
        rows = [[row.path, json.dumps(row.value), row.source] for row in found.rows()]
        console.out(table(["KEY", "VALUE", "SOURCE"], rows))
    else:
        console.out(yaml.safe_dump(deployment_file.as_tree(found.config), sort_keys=False), end="")


@config.command("examples")
def config_examples(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Target folder; by default the current one.")] = Path(),
) -> None:
    """Write the shipped files to FOLDER/deploy: example deployment files, Slurm scripts, manifests, units, dashboards."""
    from orchestrator.files import SHIPPED

    target = folder.expanduser() / "deploy"
    try:
        shutil.copytree(SHIPPED, target)
    except FileExistsError:
        raise Rejected(f"{target} is there already", hint="trireme config examples ANOTHER_FOLDER") from None
    except OSError as error:
        raise EnvironmentFault(f"{target} cannot be written", error.strerror or str(error), "name another folder") from None
    context.obj.out("\n".join(str(path) for path in sorted((target / "examples").iterdir())))
