"""The join file of standing routers: it tells other deployments how their replicas join.

Owns the content of the join file, which holds no secret: replicas also need a pass (:mod:`orchestrator.auth.keyring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from orchestrator.config.deployment_file import Config
from orchestrator.config.router_spec import WILDCARDS, ModelCard
from orchestrator.files import write_private
from workers.artifacts.safetensors_file import hash_file
from workers.protocol.errors import ConfigError
from workers.protocol.messages import PROTOCOL
from workers.protocol.specs import RouterAddress

#: The file's name in the run folder of the deployment that has the routers.
JOIN_FILE = "join.json"


class JoinFile(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses and models of routers. ``routers``: their back sockets; ``rpc``: their RPC servers; ``models``: name -> SHA-256 of the
    model's ``tokenizer.json``; ``replica_timeout_s``: the silence after which a replica counts as lost."""

    protocol: int
    name: str
    routers: tuple[RouterAddress, ...]
    rpc: tuple[RouterAddress, ...]
    models: dict[str, str]
    http: str = ""
    replica_timeout_s: float = 2.0


def check(config: Config) -> None:
    """Raises :class:`ConfigError` if no replica could join the routers of this configuration."""
    if not config.back.host:
        raise ConfigError(
            "back.host: is missing", "standing routers are reached by replicas of other hosts", "name an address of this host to listen on"
        )
    if not config.rpc.host:
        raise ConfigError("rpc.host: is missing", "who joins asks the routers there whether its replicas are accepted", "name one")
    if config.join.file:
        raise ConfigError("join: routers join nothing", "replicas do", "trireme up FILE starts replicas that join")


def publish(config: Config, routers: Sequence[RouterAddress], server_key: str, cards: Sequence[ModelCard], url: str) -> Path:
    """Write the join file of running routers. Raises :class:`EnvironmentFault`."""
    rpc_host = _reachable(config.rpc.host, config)
    port = urlsplit(url).port
    file = JoinFile(
        protocol=PROTOCOL,
        name=config.name,
        routers=tuple(routers),
        rpc=tuple(
            RouterAddress(endpoint=f"tcp://{rpc_host}:{config.rpc.port + index}", server_key=server_key) for index in range(config.routers)
        ),
        models={card.name: fingerprint(Path(card.tokenizer)) for card in cards},
        http=f"{'http' if config.http.tls is None else 'https'}://{_reachable(config.http.host, config)}:{port}",
        replica_timeout_s=config.replica_timeout_s,
    )
    path = config.home / JOIN_FILE
    write_private(path, msgspec.json.format(msgspec.json.encode(file), indent=2))
    return path


def fingerprint(tokenizer: Path) -> str:
    """A hash of the tokenizer, which must be equal at routers and replicas."""
    return hash_file(tokenizer / "tokenizer.json").sha256


def _reachable(host: str, config: Config) -> str:
    return config.back.known_as if host in WILDCARDS else host
