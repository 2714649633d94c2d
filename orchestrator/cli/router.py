"""`trireme router`: routers alone, for replicas of any job or cluster to join."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict

from orchestrator.cli.deployment_options import Detach, FrontendOptions, LocationOptions
from orchestrator.cli.hosting import host_or_detach
from orchestrator.cli.option_structs import with_option_structs


@with_option_structs
def router(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file with back.host and rpc.host, such as deploy/examples/router.yaml.")],
    frontend: FrontendOptions,
    location: LocationOptions,
    detach: Detach = False,
) -> None:
    """Start only the routers of a file; replicas join them with a pass (`trireme keys join`). Ctrl-C or SIGTERM drains and stops them."""
    from orchestrator.config import deployment_file

    flags = asdict(frontend) | asdict(location)
    host_or_detach(context.obj, deployment_file.load(file, flags=flags, env=os.environ).config, detach, routers_only=True)
