"""From a configuration to what is to run: artifacts resolved, one GangSpec a replica, one RouterSpec a router.

Owns nothing; writes keys through the key ring and models through the cache. Starts no process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from orchestrator.config import Config, ModelConfig
from orchestrator.core.place import Share
from orchestrator.keys import KeyRing
from orchestrator.launch.gang import GangSpec, write_private
from orchestrator.models import locate, resolve
from orchestrator.router.admit import Role
from orchestrator.spec import HttpSpec, ModelCard, RouterSpec
from workers.artifacts.artifact import open_artifact
from workers.artifacts.convert import Progress
from workers.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.spec import TERM_GRACE_S, EngineSpec, Parallel, ReplicaSpec, RouterAddress
from workers.trtllm.engine_dir import is_engine_dir
from workers.trtllm.model import open_model


class GangArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """The folder that one replica loads, and how."""

    name: str
    parallel: Parallel
    artifact: str
    engine: EngineSpec


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model with its files on this host. ``source``: what the configuration named; ``tokenizer``: folder for the routers."""

    config: ModelConfig
    source: str
    tokenizer: str
    gangs: tuple[GangArtifact, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    gangs: list[GangSpec]
    routers: list[RouterSpec]


def resolve_model(config: ModelConfig, cache: Path, progress: Progress) -> ServedModel:
    """Fetch and convert what the replicas need. Raises ConfigError for an impossible layout, and what ``models.resolve`` raises."""
    gangs = []
    for (name, parallel), member in zip(config.gangs(), config.members(), strict=True):
        try:
            artifact = _artifact(member, parallel, cache, progress)
        except ConfigError as error:
            raise ConfigError(f"replica {name}: {error.what}", error.why, error.hint) from None
        gangs.append(GangArtifact(name=name, parallel=parallel, artifact=str(artifact), engine=member.engine_spec()))
    tokenizer = next((found for gang in gangs if (found := _tokenizer_dir(Path(gang.artifact))) is not None), None)
    if tokenizer is None:
        raise ArtifactError(
            f"{gangs[0].artifact} has no tokenizer",
            "routers need tokenizer.json to read prompts",
            "copy the tokenizer's files beside the weights",
        )
    return ServedModel(config=config, source=_source(config), tokenizer=str(tokenizer), gangs=tuple(gangs))


def _source(config: ModelConfig) -> str:
    """What the configuration names: a model's name, or an absolute path."""
    path = Path(config.path or config.name).expanduser()
    return str(path.absolute()) if path.exists() else config.path or config.name


def _artifact(config: ModelConfig, parallel: Parallel, cache: Path, progress: Progress) -> Path:
    """What the ranks of one gang load; ``config``: the model as this gang runs it."""
    source = _source(config)
    if config.engine == "trtllm":  # an engine folder, or weights that TensorRT-LLM splits by itself
        return open_model(locate(source, cache, progress)).path
    if config.engine == "fake" and _tokens_only(Path(source)):
        return Path(source)
    # The fake engine has no weights to split: any layout of any model will do.
    layout = Parallel() if config.engine == "fake" else parallel
    bare = config.load_format == "dummy"
    return resolve(source, parallel=layout, dtype=config.dtype, cache=cache, bare=bare, progress=progress)


def _tokens_only(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() and not (path / "config.json").exists()


def _tokenizer_dir(artifact: Path) -> Path | None:
    if _tokens_only(artifact):
        return artifact
    return (open_model(artifact) if is_engine_dir(artifact) else open_artifact(artifact, bare=True)).tokenizer_dir


def plan(config: Config, models: list[ServedModel], keys: KeyRing, back_host: str) -> Plan:
    """Specs of everything. ``back_host``: where gangs on other hosts reach the routers by tcp with CURVE; empty = Unix sockets."""
    folder = config.home / "routers"
    secured = bool(back_host or config.rpc.host)
    server_key = keys.pair("router", "all").public
    ports = _ports(folder, back_host, config.routers)
    backs = [f"tcp://{back_host}:{ports[i]}" if back_host else f"ipc://{folder}/router{i}-back.sock" for i in range(config.routers)]
    addresses = tuple(RouterAddress(endpoint=back, server_key=server_key if back_host else "") for back in backs)
    cards = tuple(
        ModelCard(
            name=model.config.name,
            tokenizer=model.tokenizer,
            aliases=model.config.aliases,
            max_seq_len=model.config.max_seq_len,
            created=int(time.time()),
        )
        for model in models
    )
    http = HttpSpec(
        host=config.http.host,
        port=config.http.port,
        reuse_port=config.routers > 1,
        max_body_bytes=config.http.max_body_bytes,
        api_keys_file=str(config.api_keys_file or ""),
        insecure_without_keys=config.insecure_http_without_keys,
    )
    routers = [
        RouterSpec(
            name=f"router{i}",
            back=backs[i],
            rpc=f"tcp://{config.rpc.host}:{config.rpc.port + i}" if config.rpc.host else f"ipc://{folder}/router{i}-rpc.sock",
            models=cards,
            http=http,
            admission=config.admission,
            peers=addresses,
            key_file=str(keys.path("router", "all")) if secured else "",
            allowed_file=str(keys.allowed_file) if secured else "",
            salt_file=str(keys.salt_file),
            state_file=str(folder / f"router{i}.state.json"),
            heartbeat_s=config.heartbeat_s,
            replica_timeout_s=config.replica_timeout_s,
            hang_floor_s=config.hang_floor_s,
            log_format=config.log_format,
        )
        for i in range(config.routers)
    ]
    found = gangs(config, models, addresses, keys, secured=bool(back_host))
    admit(keys, found, secured=bool(back_host))
    return Plan(gangs=found, routers=routers)


def gangs(config: Config, models: list[ServedModel], routers: tuple[RouterAddress, ...], keys: KeyRing, *, secured: bool) -> list[GangSpec]:
    """One spec a replica. ``secured``: they reach the ``routers`` by tcp, with a key pair of their own."""
    return [_gang(config, model, gang, routers, keys, secured) for model in models for gang in model.gangs]


def admit(keys: KeyRing, gangs: Sequence[GangSpec], *, secured: bool) -> None:
    """Let these gangs in at the routers, and no others."""
    members: list[tuple[Role, str]] = [("replica", gang.replica.name) for gang in gangs] if secured else []
    keys.allow([*members, ("client", "local"), ("router", "all")], {gang.replica.name: gang.replica.model for gang in gangs})


def _gang(
    config: Config, model: ServedModel, gang: GangArtifact, routers: tuple[RouterAddress, ...], keys: KeyRing, secured: bool
) -> GangSpec:
    replica = ReplicaSpec(
        name=gang.name,
        model=model.config.name,
        artifact=gang.artifact,
        parallel=gang.parallel,
        engine=gang.engine,
        routers=routers,
        heartbeat_s=config.heartbeat_s,
        hang_floor_s=config.hang_floor_s,
        # Its farewell must be heard before the controller's own grace ends and kills it.
        drain_grace_s=min(config.drain_grace_s, TERM_GRACE_S),
    )
    return GangSpec(
        deployment=config.name,
        replica=replica,
        run_dir=str(config.home / "replicas"),
        share=Share(cpus=model.config.cpus_per_rank, gpus=1.0 if gang.engine.device == "cuda" else 0.0),
        spread=model.config.spread,
        key=msgspec.json.encode(keys.pair("replica", gang.name)).decode() if secured else "",
    )


def _ports(folder: Path, host: str, count: int) -> list[int]:
    """Free tcp ports for the back sockets, the same after a restart: gangs that live on know no others."""
    if not host:
        return []
    kept = folder / "ports.json"
    if kept.exists():
        try:
            ports = msgspec.json.decode(kept.read_bytes(), type=list[int])
        except msgspec.DecodeError:
            ports = []
        if len(ports) == count:
            return ports
    probes = [socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        ports = [probe.getsockname()[1] for probe in probes]
    except OSError as error:
        raise EnvironmentFault(f"no free port on {host}", error.strerror or str(error)) from None
    finally:
        for probe in probes:
            probe.close()
    folder.mkdir(mode=0o700, exist_ok=True)
    write_private(kept, msgspec.json.encode(ports))
    return ports
