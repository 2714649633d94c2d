"""`trireme up`: the deployment of a file, hosted by this process or by a daemon of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict

from orchestrator.cli.deployment_options import Detach, FrontendOptions, JoinOptions, Launcher, LocationOptions
from orchestrator.cli.hosting import host_or_detach
from orchestrator.cli.option_structs import with_option_structs


@with_option_structs
def up(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="A deployment file, such as deploy/examples/local.yaml, which `trireme config examples` writes.")
    ],
    *,
    frontend: FrontendOptions,
    launcher: Launcher = None,
    location: LocationOptions,
    join: JoinOptions,
    detach: Detach = False,
) -> None:
    """Start the deployment of a file and host it; Ctrl-C or SIGTERM drains and stops it."""
    from orchestrator.config import deployment_file

    flags = asdict(frontend) | asdict(location) | asdict(join) | {"launcher": launcher}
    host_or_detach(context.obj, deployment_file.load(file, flags=flags, env=os.environ).config, detach)
