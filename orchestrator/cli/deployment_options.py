"""Flags of a deployment that `serve`, `up`, `router` and `update` share. Owns their spelling and nothing else.

The fields of the structs are named as the settings of :func:`orchestrator.config.deployment_file.settings`; None = not given.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

Port = Annotated[int | None, typer.Option("--port", help="HTTP port; 0 = any free port.")]
Routers = Annotated[int | None, typer.Option("--routers", min=1, help="Router processes that share the port.")]
Launcher = Annotated[
    str | None,
    typer.Option("--launcher", metavar="auto|ray|local", help="Use Ray, or this machine without Ray; auto: Ray if one runs."),
]
ApiKeysFile = Annotated[
    str | None, typer.Option("--api-keys-file", help="File of the API keys that the HTTP API accepts; see `trireme keys api`.")
]
Insecure = Annotated[
    bool | None, typer.Option("--insecure-http-without-keys", help="Allow a --host that other machines can reach without API keys.")
]
Plain = Annotated[
    bool | None, typer.Option("--insecure-http-without-tls", help="Allow a --host that other machines can reach without TLS.")
]
JoinFile = Annotated[str | None, typer.Option("--join-file", help="Start no routers; replicas join the routers of this join.json.")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return when the deployment is ready; `trireme down` ends it.")]


Origins = Annotated[
    str | None, typer.Option("--allowed-origins", help="Origins of web pages that may use the HTTP API, separated by commas; * = all.")
]
GenerationConfigFlag = Annotated[
    str | None,
    typer.Option("--generation-config", metavar="auto|none", help="Defaults of requests: the model's generation_config.json, or none."),
]


class FrontendOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP API and the routers behind it."""

    port: Port = None
    api_keys_file: ApiKeysFile = None
    insecure_http_without_keys: Insecure = None
    insecure_http_without_tls: Plain = None
    routers: Routers = None
    allowed_origins: Origins = None
    generation_config: GenerationConfigFlag = None


class LocationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a deployment and its folders."""

    name: Annotated[str | None, typer.Option("--name", help="Name of the deployment.")] = None
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Folder of sockets, keys, logs and state.")] = None
    cache_dir: Annotated[str | None, typer.Option("--cache-dir", help="Folder of models.")] = None


class JoinOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The routers of another deployment, in place of routers of its own."""

    join_file: JoinFile = None
    join_key_file: Annotated[str | None, typer.Option("--join-key-file", help="The pass for it; see `trireme keys join`.")] = None
