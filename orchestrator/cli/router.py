"""`trireme router`: routers alone, for replicas of any job or cluster to join."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.deployment_options import ApiKeysFile, CacheDir, Detach, Insecure, Name, Port, Routers, RunDir
from orchestrator.cli.hosting import host_or_detach


def router(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file with back.host and rpc.host, such as deploy/examples/router.yaml.")],
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    insecure_http_without_keys: Insecure = None,
    routers: Routers = None,
    name: Name = None,
    run_dir: RunDir = None,
    cache_dir: CacheDir = None,
    detach: Detach = False,
) -> None:
    """Start the routers of a file alone; replicas join them with a pass (`trireme keys join`). Ctrl-C or SIGTERM drains and stops them."""
    from orchestrator.config import deployment_file

    flags = {
        "port": port, "api_keys_file": api_keys_file, "insecure_http_without_keys": insecure_http_without_keys, "routers": routers,
        "name": name, "run_dir": run_dir, "cache_dir": cache_dir,
    }  # fmt: skip
    host_or_detach(context.obj, deployment_file.load(file, flags=flags, env=os.environ).config, detach, routers_only=True)
