"""Turns a configuration into specs: artifacts are resolved, one GangSpec per replica, one RouterSpec per router.

Owns nothing; writes keys through the key ring and models through the cache. Starts no process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from orchestrator.auth.curve_acl import Role
from orchestrator.auth.keyring import KeyRing
from orchestrator.config.deployment_file import Config, ModelConfig
from orchestrator.config.engine_settings import GangRequest, StepLimits
from orchestrator.config.router_spec import HttpSpec, ModelCard, RouterSpec, TlsConfig
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.files import write_private
from orchestrator.model_store import locate, resolve, tokenizer_folder
from orchestrator.planner.automatic import ClusterHardware, GangDecision, ModelDescription, decide
from orchestrator.planner.placement import RankShare
from workers.artifacts.artifact import open_artifact, quant_for, refuse_foreign
from workers.artifacts.convert import Progress
from workers.engines.trtllm.engine_dir import EngineDir, is_engine_dir
from workers.engines.trtllm.model import open_model
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import TERM_GRACE_S, EngineSpec, Parallel, ReplicaSpec, RouterAddress


class GangArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """The folder that one replica loads, and its settings."""

    name: str
    parallel: Parallel
    artifact: str
    engine: EngineSpec


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model with its files on this host. ``source``: the model in the configuration; ``tokenizer``: folder for the routers;
    ``chat_template``: path of the file that replaces the folder's template."""

    config: ModelConfig
    source: str
    tokenizer: str
    chat_template: str = ""
    gangs: tuple[GangArtifact, ...]


class DeploymentPlan(msgspec.Struct, frozen=True, kw_only=True):
    gangs: list[GangSpec]
    routers: list[RouterSpec]


class RouterEndpoints(msgspec.Struct, frozen=True, kw_only=True):
    """How replicas reach their routers. ``addresses``: of the routers; ``secured``: tcp is used, so each replica has a key pair.

    At routers of another deployment, ``key`` is the key pair of all our replicas (JSON), and ``prefix`` is put before their names.
    """

    addresses: tuple[RouterAddress, ...]
    secured: bool = False
    prefix: str = ""
    key: str = ""


def decide_settings(models: Sequence[ModelConfig], hardware: ClusterHardware, cache: Path, progress: Progress) -> list[GangDecision]:
    """Fetch the models and decide all automatic settings of their replicas, in the file's order. Raises as
    :func:`orchestrator.planner.automatic.decide` and :func:`orchestrator.model_store.locate` do."""
    requests = [request for model in models for request in model.gangs()]
    return decide([(request, _describe(request, cache, progress)) for request in requests], hardware)


def _describe(request: GangRequest, cache: Path, progress: Progress) -> ModelDescription:
    """The facts in the files of a replica's model; weights are not read."""
    if request.engine == "fake":
        return ModelDescription()
    path = locate(_source(request.path), cache, progress)
    model = open_model(path) if request.engine == "trtllm" else open_artifact(path, weights_optional=_bare(request))
    if isinstance(model, EngineDir):
        built = StepLimits(max_batch_size=model.max_batch_size, max_num_tokens=model.max_num_tokens)
        return ModelDescription(built=built, layout=model.parallel)
    if request.engine == "portable":
        refuse_foreign(model)
    quant = quant_for(model, request.settings.portable.quant)
    return ModelDescription(
        shape=model.model, quant=quant, dtype=model.dtype, dequantized=model.dequantized, stored_bytes=model.stored_bytes
    )


def prepare_models(models: Sequence[ModelConfig], hardware: ClusterHardware, cache: Path, progress: Progress) -> list[ServedModel]:
    """Fetch, decide and convert: :func:`decide_settings`, then :func:`resolve_models`."""
    return resolve_models(models, decide_settings(models, hardware, cache, progress), cache, progress)


def resolve_models(models: Sequence[ModelConfig], decisions: Sequence[GangDecision], cache: Path, progress: Progress) -> list[ServedModel]:
    """Convert what the replicas need. ``decisions``: of :func:`decide_settings` for the same models. Raises ConfigError for an impossible
    layout, and what ``models.resolve`` raises."""
    return [_resolve(model, [each for each in decisions if each.request.model == model.name], cache, progress) for model in models]


def _resolve(config: ModelConfig, decisions: Sequence[GangDecision], cache: Path, progress: Progress) -> ServedModel:
    chat_template = _chat_template(config)
    tokenizer = _own_tokenizer(config, cache, progress)
    gangs = []
    for each in decisions:
        try:
            artifact = _artifact(each, cache, progress)
        except ConfigError as error:
            raise ConfigError(f"replica {each.request.name}: {error.what}", error.why, error.hint) from None
        gangs.append(GangArtifact(name=each.request.name, parallel=each.parallel, artifact=str(artifact), engine=each.engine))
    if tokenizer is None:
        tokenizer = _first_tokenizer([Path(gang.artifact) for gang in gangs], cache, progress)
    source = _source(config.path or config.name)
    return ServedModel(config=config, source=source, tokenizer=str(tokenizer), chat_template=chat_template, gangs=tuple(gangs))


def resolve_tokenizer(config: ModelConfig, cache: Path, progress: Progress) -> ServedModel:
    """The model's files for routers without gangs, which need no weights. Raises as :func:`resolve_models`."""
    chat_template, source = _chat_template(config), _source(config.path or config.name)
    tokenizer = _own_tokenizer(config, cache, progress)
    if tokenizer is None:
        path = locate(source, cache, progress, weights=False)
        tokenizer = _first_tokenizer([path], cache, progress)
    return ServedModel(config=config, source=source, tokenizer=str(tokenizer), chat_template=chat_template, gangs=())


def _own_tokenizer(config: ModelConfig, cache: Path, progress: Progress) -> Path | None:
    """The tokenizer folder in the configuration; None if there is none. Raises :class:`ArtifactError`."""
    if not config.tokenizer:
        return None
    try:
        return tokenizer_folder(locate(_source(config.tokenizer), cache, progress, weights=False), cache, progress)
    except ArtifactError as error:
        raise ArtifactError(f"tokenizer of {config.name}: {error.what}", error.why, error.hint) from None


def _chat_template(config: ModelConfig) -> str:
    """The absolute path of the chat template in the configuration; empty if there is none. Raises ConfigError."""
    path = Path(config.chat_template).expanduser()
    if config.chat_template and not path.is_file():
        raise ConfigError(f"chat_template of {config.name}: {path} is no file", "it names a file with a Jinja template", "correct the path")
    return str(path.absolute()) if config.chat_template else ""


def _first_tokenizer(artifacts: Sequence[Path], cache: Path, progress: Progress) -> Path:
    tokenizer = next((found for artifact in artifacts if (found := _tokenizer_dir(artifact)) is not None), None)
    return tokenizer or tokenizer_folder(artifacts[0], cache, progress)


def _source(name: str) -> str:
    """The model in the configuration: a name, or an absolute path."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _bare(request: GangRequest) -> bool:
    """Whether the replica starts without reading weights."""
    return request.settings.portable.load_format == "dummy"


def _artifact(gang: GangDecision, cache: Path, progress: Progress) -> Path:
    """The path that the ranks of one gang load."""
    source, engine = _source(gang.request.path), gang.request.engine
    if engine == "trtllm":  # an engine folder, or weights that TensorRT-LLM itself splits
        return open_model(locate(source, cache, progress)).path
    if engine == "fake" and _tokens_only(Path(source)):
        return Path(source)
    # The fake engine has no weights to split: it accepts any layout of any model.
    layout = Parallel() if engine == "fake" else gang.parallel
    return resolve(source, parallel=layout, dtype=gang.engine.dtype, cache=cache, bare=_bare(gang.request), progress=progress)


def _tokens_only(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() and not (path / "config.json").exists()


def _tokenizer_dir(artifact: Path) -> Path | None:
    if _tokens_only(artifact):
        return artifact
    return (open_model(artifact) if is_engine_dir(artifact) else open_artifact(artifact, weights_optional=True)).tokenizer_dir


def own_endpoints(config: Config, keys: KeyRing, host: str) -> RouterEndpoints:
    """The back sockets of our own routers. ``host``: the address at which gangs on other hosts reach us; without it and ``back.host``, Unix
    sockets."""
    folder, back = config.home / "routers", config.back
    if back.host:
        places = [f"tcp://{back.known_as}:{back.port + i}" for i in range(config.routers)]
    elif host:
        places = [f"tcp://{host}:{port}" for port in _ports(folder, host, config.routers)]
    else:
        places = [f"ipc://{folder}/router{i}-back.sock" for i in range(config.routers)]
    secured = bool(back.host or host)
    server_key = keys.pair("router", "all").public if secured else ""
    return RouterEndpoints(addresses=tuple(RouterAddress(endpoint=place, server_key=server_key) for place in places), secured=secured)


def plan(config: Config, models: Sequence[ServedModel], keys: KeyRing, endpoints: RouterEndpoints) -> DeploymentPlan:
    """Specs of all gangs and routers of this deployment; no routers if the replicas join those of another deployment."""
    found = gangs(config, models, endpoints, keys)
    admit(keys, found, endpoints)
    return DeploymentPlan(gangs=found, routers=[] if endpoints.prefix else _routers(config, models, keys, endpoints))


def model_cards(models: Sequence[ServedModel]) -> tuple[ModelCard, ...]:
    """The models as routers need them."""
    return tuple(
        ModelCard(
            name=model.config.name,
            tokenizer=model.tokenizer,
            chat_template=model.chat_template,
            aliases=model.config.aliases,
            max_seq_len=model.config.settings.max_seq_len,
            created=int(time.time()),
            generation_config=model.config.generation_config,
        )
        for model in models
    )


def _routers(config: Config, models: Sequence[ServedModel], keys: KeyRing, endpoints: RouterEndpoints) -> list[RouterSpec]:
    folder = config.home / "routers"
    secured = endpoints.secured or bool(config.rpc.host)
    served = model_cards(models)
    given = msgspec.structs.asdict(config.http) | {"api_keys_file": str(config.api_keys_file or "")}
    if (tls := config.http.tls) is not None:
        given["tls"] = TlsConfig(
            **{name: str(Path(file).expanduser().absolute()) for name, file in msgspec.structs.asdict(tls).items() if file}
        )
    http = HttpSpec(
        **given, reuse_port=config.routers > 1, insecure_without_keys=config.insecure_http_without_keys,
        insecure_without_tls=config.insecure_http_without_tls,
    )  # fmt: skip
    return [
        RouterSpec(
            name=f"router{i}",
            back=f"tcp://{config.back.host}:{config.back.port + i}" if config.back.host else endpoints.addresses[i].endpoint,
            rpc=f"tcp://{config.rpc.host}:{config.rpc.port + i}" if config.rpc.host else f"ipc://{folder}/router{i}-rpc.sock",
            models=served,
            http=http,
            admission=config.admission,
            peers=endpoints.addresses,
            key_file=str(keys.path("router", "all")) if secured else "",
            allowed_file=str(keys.allowed_file) if secured else "",
            salt_file=str(keys.salt_file),
            state_file=str(folder / f"router{i}.state.json"),
            heartbeat_s=config.heartbeat_s,
            replica_timeout_s=config.replica_timeout_s,
            hang_floor_s=config.hang_floor_s,
            drain_grace_s=config.drain_grace_s,
            log_format=config.log_format,
            metrics=msgspec.structs.replace(config.metrics, port=config.metrics.port + i if config.metrics.port else 0),
            tracing=config.tracing,
        )
        for i in range(config.routers)
    ]


def gangs(config: Config, models: Sequence[ServedModel], endpoints: RouterEndpoints, keys: KeyRing) -> list[GangSpec]:
    """One spec per replica."""
    return [_gang(config, model, gang, endpoints, keys) for model in models for gang in model.gangs]


def admit(keys: KeyRing, gangs: Sequence[GangSpec], endpoints: RouterEndpoints) -> None:
    """Authorize these gangs at our routers; others need a pass. Does nothing at routers of another deployment."""
    if endpoints.prefix:
        return
    members: list[tuple[Role, str]] = [("replica", gang.replica.name) for gang in gangs] if endpoints.secured else []
    keys.allow([*members, ("client", "local"), ("router", "all")], {gang.replica.name: gang.replica.model for gang in gangs})


def renamed(gang: GangSpec, name: str, endpoints: RouterEndpoints, keys: KeyRing) -> GangSpec:
    """The same gang under another replica name."""
    replica = msgspec.structs.replace(gang.replica, name=name, announced=_announced(name, endpoints))
    return msgspec.structs.replace(gang, replica=replica, key=_key_of(name, endpoints, keys))


def _announced(name: str, endpoints: RouterEndpoints) -> str:
    return endpoints.prefix + name if endpoints.prefix else ""


def _key_of(name: str, endpoints: RouterEndpoints, keys: KeyRing) -> str:
    """The key pair (JSON) with which a replica of this name reaches its routers; empty where it needs none."""
    return endpoints.key or (msgspec.json.encode(keys.pair("replica", name)).decode() if endpoints.secured else "")


def _gang(config: Config, model: ServedModel, gang: GangArtifact, endpoints: RouterEndpoints, keys: KeyRing) -> GangSpec:
    replica = ReplicaSpec(
        name=gang.name,
        model=model.config.name,
        artifact=gang.artifact,
        tokenizer=model.tokenizer if not (Path(gang.artifact) / "tokenizer.json").is_file() or model.config.tokenizer else "",
        parallel=gang.parallel,
        engine=gang.engine,
        routers=endpoints.addresses,
        heartbeat_s=config.heartbeat_s,
        hang_floor_s=config.hang_floor_s,
        # The leader must finish before the controller's grace ends and the gang is killed.
        drain_grace_s=min(config.drain_grace_s, TERM_GRACE_S),
        announced=_announced(gang.name, endpoints),
        log_format=config.log_format,
    )
    return GangSpec(
        deployment=config.name,
        replica=replica,
        run_dir=str(config.home / "replicas"),
        share=RankShare(cpus=model.config.cpus_per_rank, gpus=1.0 if gang.engine.device == "cuda" else 0.0),
        spread=model.config.spread,
        key=_key_of(gang.name, endpoints, keys),
    )


def _ports(folder: Path, host: str, count: int) -> list[int]:
    """Free tcp ports for the back sockets, the same after a restart, because running gangs know only these."""
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
