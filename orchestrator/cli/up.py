"""`trireme up`: the deployment of a file, hosted by this process or by a daemon of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.deployment_options import (
    ApiKeysFile,
    CacheDir,
    Detach,
    Insecure,
    JoinFile,
    JoinKeyFile,
    Launcher,
    Name,
    Port,
    Routers,
    RunDir,
)
from orchestrator.cli.hosting import host_or_detach


def up(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file, such as deploy/examples/local.yaml.")],
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    insecure_http_without_keys: Insecure = None,
    routers: Routers = None,
    launcher: Launcher = None,
    name: Name = None,
    run_dir: RunDir = None,
    cache_dir: CacheDir = None,
    join_file: JoinFile = None,
    join_key_file: JoinKeyFile = None,
    detach: Detach = False,
) -> None:
    """Start the deployment of a file and stay with it; Ctrl-C or SIGTERM drains and stops it."""
    from orchestrator.config import deployment_file

    flags = {
        "port": port, "api_keys_file": api_keys_file, "insecure_http_without_keys": insecure_http_without_keys, "routers": routers,
        "launcher": launcher, "name": name, "run_dir": run_dir, "cache_dir": cache_dir, "join_file": join_file,
        "join_key_file": join_key_file,
    }  # fmt: skip
    host_or_detach(context.obj, deployment_file.load(file, flags=flags, env=os.environ).config, detach)
