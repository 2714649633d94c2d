"""Flags of a deployment that `serve`, `up`, `router` and `update` share. Owns their spelling and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

Name = Annotated[str | None, typer.Option("--name", help="Name of the deployment.")]
Port = Annotated[int | None, typer.Option("--port", help="HTTP port; 0 = any free one.")]
Launcher = Annotated[str | None, typer.Option("--launcher", metavar="ray|local", help="Through Ray, or directly on this machine.")]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="Where sockets, keys, logs and state go.")]
CacheDir = Annotated[str | None, typer.Option("--cache-dir", help="Where models are kept.")]
Routers = Annotated[int | None, typer.Option("--routers", min=1, help="Router processes that share the port.")]
ApiKeysFile = Annotated[str | None, typer.Option("--api-keys-file", help="Whose keys open the HTTP door; see `trireme keys api`.")]
Insecure = Annotated[
    bool | None, typer.Option("--insecure-http-without-keys", help="Let --host be reachable from other machines without API keys.")
]
JoinFile = Annotated[str | None, typer.Option("--join-file", help="Have the replicas join the routers of this join.json, start none.")]
JoinKeyFile = Annotated[str | None, typer.Option("--join-key-file", help="The pass for it; see `trireme keys join`.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready; `trireme down` ends it.")]
