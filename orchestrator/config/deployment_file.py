"""Makes frozen structs of a deployment file, flags and the environment, and keeps the source of every value.

Owns the keys that a deployment file may have. Below layer 5, no other module reads the environment. Keys are the long flags
with underscores. Precedence: flag > environment (``TRIREME_*``) > file > default. Must never start anything or read a model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from orchestrator.config import bounds, yaml_tree
from orchestrator.config.engine_settings import AUTO, Auto, DeviceSetting, EngineSettings, GangRequest
from orchestrator.config.router_spec import AdmissionSpec, BackSpec, GenerationConfig, HttpConfig, JoinSpec, MetricsSpec, TracingSpec
from workers.protocol.errors import ConfigError
from workers.protocol.specs import EngineKind, FakeOptions, PortableOptions

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,38}[a-z0-9])?")
_NAMING = "a name is 1 to 40 of a-z, 0-9, '.' and '-'"
_PREFIX = "TRIREME_"
DEFAULT_RUN_DIR = "~/.local/state/trireme"


class RpcConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The RPC server. No ``host``: a Unix socket in the run folder. Else ``tcp`` with CURVE; router i listens on ``port`` + i."""

    host: str = ""
    port: int = 8100


class RayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``address`` of a cluster to join (``RAY_ADDRESS`` counts too); empty = with ``launcher: ray``, start one here that ends with this
    process, with ``num_cpus`` CPU shares (0 = one a rank and one for the controller) and ``num_gpus`` GPUs (-1 = those that Ray finds)."""

    address: str = ""
    num_cpus: int = 0
    num_gpus: int = -1


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One gang of ``tp_size`` x ``pp_size`` ranks; missing values are those of the model. Replicas of one model may run on different
    engines and from different files (for example an engine folder and the weights that it was built from)."""

    name: str = ""
    tp_size: int = 0
    pp_size: int = 0
    engine: EngineKind | None = None
    path: str = ""
    device: DeviceSetting | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One served model. ``path``: catalogue name, Hugging Face folder, GGUF or checkpoint; empty = ``name``. ``tokenizer``: a folder with a
    tokenizer that replaces the model's own; ``chat_template``: a file with a template that replaces the model's own. ``tp_size`` ``auto``:
    as many ranks as the weights need.

    ``replicas``: their number, each of ``tp_size`` x ``pp_size`` ranks; or a list with the layout of each. ``spread``: each pipeline stage
    gets a node of its own. ``expert_parallel``: experts are distributed whole to the ranks of a stage, not each expert's columns.
    ``engine``: the engine that computes, with its ``settings``. ``generation_config``: whether the model's ``generation_config.json`` gives
    the defaults of requests (auto) or not (none)."""

    name: str
    path: str = ""
    chat_template: str = ""
    tokenizer: str = ""
    aliases: tuple[str, ...] = ()
    replicas: int | tuple[ReplicaConfig, ...] = 1
    tp_size: int | Auto = AUTO
    pp_size: int = 1
    spread: bool = False
    expert_parallel: bool = False
    cpus_per_rank: float = 1.0
    engine: EngineKind = "portable"
    generation_config: GenerationConfig = "auto"
    settings: EngineSettings = EngineSettings()

    def gangs(self) -> list[GangRequest]:
        """The requested settings of each replica, in file order; replicas without a name are numbered."""
        base = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")[:32] or "model"
        return [
            GangRequest(
                name=row.name or f"{base}-{index}",
                model=self.name,
                path=row.path or self.path or self.name,
                engine=row.engine or self.engine,
                tp_size=row.tp_size or self.tp_size,
                pp_size=row.pp_size or self.pp_size,
                settings=msgspec.structs.replace(self.settings, device=row.device or self.settings.device),
                cpus_per_rank=self.cpus_per_rank,
                spread=self.spread,
                expert_parallel=self.expert_parallel,
            )
            for index, row in enumerate(self._replicas())
        ]

    def _replicas(self) -> tuple[ReplicaConfig, ...]:
        return (ReplicaConfig(),) * self.replicas if isinstance(self.replicas, int) else self.replicas


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole deployment. Times in seconds. ``run_dir``: sockets, keys, logs and state (0700); ``cache_dir``: models.
    ``insecure_http_without_keys``: the HTTP API may listen beyond loopback without API keys (and without TLS);
    ``insecure_http_without_tls``: without TLS."""

    models: tuple[ModelConfig, ...]
    name: str = "local"
    http: HttpConfig = HttpConfig()
    rpc: RpcConfig = RpcConfig()
    back: BackSpec = BackSpec()
    join: JoinSpec = JoinSpec()
    routers: int = 1
    launcher: Literal["auto", "ray", "local"] = AUTO
    ray: RayConfig = RayConfig()
    admission: AdmissionSpec = AdmissionSpec()
    heartbeat_s: float = 0.2
    replica_timeout_s: float = 2.0
    hang_floor_s: float = 10.0
    start_timeout_s: float = 600.0
    drain_grace_s: float = 30.0
    run_dir: str = DEFAULT_RUN_DIR
    cache_dir: str = "~/.cache/trireme"
    log_format: Literal["text", "json"] = "text"
    metrics: MetricsSpec = MetricsSpec()
    tracing: TracingSpec = TracingSpec()
    insecure_http_without_keys: bool = False
    insecure_http_without_tls: bool = False

    def __post_init__(self) -> None:
        _check(_NAME.fullmatch(self.name) is not None, f"name: {self.name!r} is not usable", _NAMING, "choose another name")
        _check(
            bool(self.models),
            "models: there is none",
            "a deployment serves at least one model",
            "name one: models: [{name: smollm2-135m-instruct}]",
        )
        _check(
            not self.http.exposed or bool(self.http.api_keys_file) or self.insecure_http_without_keys,
            f"http.host: {self.http.host} is not a loopback address",
            "without API keys, whoever reaches the port could use the models",
            "trireme keys api add NAME makes a key; name its file in http.api_keys_file",
        )
        _check(
            not self.http.exposed or self.http.tls is not None or self.insecure_http_without_tls or self.insecure_http_without_keys,
            f"http.host: {self.http.host} is not a loopback address, and there is no http.tls",
            "without TLS, whoever is on the way reads keys and prompts",
            "name cert and key in http.tls; or insecure_http_without_tls: true, where a proxy or a trusted network protects it",
        )
        _check(
            self.routers == 1 or self.http.port > 0,
            "http.port: 0 with several routers",
            "they share one port, so it must be known",
            "name one, such as 8000",
        )
        ports = (
            ("rpc", self.rpc.port if self.rpc.host else 0),
            ("back", self.back.port if self.back.host else 0),
            ("metrics", self.metrics.port),
        )
        for name, port in ports:
            _check(
                port + self.routers - 1 < 65536,
                f"{name}.port: {port} is too high for {self.routers} routers",
                f"router i listens on port + i, and the last would be {port + self.routers - 1}",
                f"{65536 - self.routers} or less",
            )
        _check(
            self.replica_timeout_s > 2 * self.heartbeat_s,
            f"replica_timeout_s: {self.replica_timeout_s} is too short",
            f"a replica is heard every {self.heartbeat_s} s (heartbeat_s), and one may be late",
            "make it more than two heartbeats",
        )
        self._check_models()

    def _check_models(self) -> None:
        seen: set[tuple[str, str]] = set()
        for index, model in enumerate(self.models):
            where = f"models[{index}]"
            _check(bool(model.name), f"{where}.name: is empty", "clients ask for a model by its name", "give it one")
            count = model.replicas if isinstance(model.replicas, int) else len(model.replicas)
            _check(
                1 <= count <= 256, f"{where}.replicas: {count} are not possible", "a model has 1 to 256 replicas", "leave it out for one"
            )
            for label in (model.name, *model.aliases):
                _check(
                    ("model", label) not in seen,
                    f"{where}: the model name {label} is used twice",
                    "requests are routed by it",
                    "rename one (name, aliases)",
                )
                seen.add(("model", label))
            try:
                gangs = model.gangs()
            except ConfigError as error:
                raise ConfigError(f"{where}: {error.what}", error.why, error.hint) from None
            for name in (gang.name for gang in gangs):
                _check(
                    _NAME.fullmatch(name) is not None, f"{where}.replicas: the name {name!r} is not usable", _NAMING, "choose another name"
                )
                _check(
                    ("replica", name) not in seen,
                    f"{where}.replicas: the name {name} is used twice",
                    "a replica is known by it",
                    "rename one",
                )
                seen.add(("replica", name))

    @property
    def home(self) -> Path:
        """The folder of this deployment: ``run_dir``/``name``."""
        return Path(self.run_dir).expanduser().absolute() / self.name

    @property
    def api_keys_file(self) -> Path | None:
        return Path(self.http.api_keys_file).expanduser().absolute() if self.http.api_keys_file else None

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir).expanduser().absolute()


class ResolvedSetting(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved setting, for ``config show --resolved``."""

    path: str
    value: object
    source: str


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration and where each of its values came from (by path, ``models[0].dtype``; values that are not listed are defaults)."""

    config: Config
    sources: dict[str, str]

    def rows(self) -> list[ResolvedSetting]:
        return list(_rows(as_tree(self.config), "", self.sources))


def _file_struct(struct: type[msgspec.Struct], **changed: Any) -> type[msgspec.Struct]:
    """A copy of ``struct`` for decoding a file: a field whose type is in ``_INLINE`` is replaced by the fields of that type. ``changed``:
    other types for the named fields."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(struct):
        if field.type in _INLINE:
            fields += [(inner.name, inner.type, inner.default) for inner in msgspec.structs.fields(_file_struct(field.type))]
        elif field.default is msgspec.NODEFAULT:
            fields.append((field.name, changed.get(field.name, field.type)))
        else:
            fields.append((field.name, changed.get(field.name, field.type), field.default))
    return msgspec.defstruct(struct.__name__, fields, frozen=True, kw_only=True, forbid_unknown_fields=True)


#: Structs without a key of their own in a file: their fields are written next to those of the struct that holds them.
_INLINE: tuple[Any, ...] = (EngineSettings, PortableOptions, FakeOptions)
_FileModel: Any = _file_struct(ModelConfig)
_FileConfig: Any = _file_struct(Config, models=tuple[_FileModel, ...])


def as_tree(config: Config) -> dict[str, Any]:
    """The whole configuration in the form of a file: mappings, lists and scalars."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    return tree | {"models": [_spelled(model, ModelConfig) for model in tree["models"]]}


def _spelled(node: dict[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        flat |= _spelled(node[field.name], field.type) if field.type in _INLINE else {field.name: node[field.name]}
    return flat


def _nested(value: msgspec.Struct, struct: type[msgspec.Struct]) -> Any:
    """A ``struct`` from ``value``, which has its fields and those of the structs in ``_INLINE`` side by side."""
    parts = {
        field.name: _nested(value, field.type) if field.type in _INLINE else getattr(value, field.name)
        for field in msgspec.structs.fields(struct)
    }
    return struct(**parts)


def _config(given: Any) -> Config:
    """The checked configuration from a ``_FileConfig``. Raises :class:`ConfigError`."""
    models = []
    for index, model in enumerate(given.models):
        try:
            models.append(_nested(model, ModelConfig))
        except ConfigError as error:
            raise ConfigError(f"models[{index}]: {error.what}", error.why, error.hint) from None
    return Config(**{name: getattr(given, name) for name in Config.__struct_fields__} | {"models": tuple(models)})


def environment() -> MutableMapping[str, str]:
    """The process's environment: below layer 5 it is read only here."""
    return os.environ


def settings() -> dict[str, str]:
    """Every flag name (underscores) -> its path; those of a model apply to all models: ``tp_size`` -> ``models[].tp_size``."""
    table = {"host": "http.host", "port": "http.port", "api_keys_file": "http.api_keys_file", "allowed_origins": "http.allowed_origins"}
    for path, kind in _leaves(_FileConfig, ""):
        if path.startswith("models[].trtllm."):  # a nested table, which would need hundreds of flags
            continue
        if kind in (str, int, float, bool) or _choices(kind):
            table[path.replace("models[].", "").replace(".", "_") if path.startswith("models") else path.replace(".", "_")] = path
    table["name"] = "name"
    table["replicas"] = "models[].replicas"
    return {flag: path for flag, path in table.items() if path != "models[].name"}


def load(
    source: Path | Mapping[str, Any],
    *,
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
) -> Resolved:
    """Read a deployment from a YAML file or a mapping. ``flags``: name with underscores (see :func:`settings`) -> value, None = not given.

    Raises :class:`ConfigError` naming the path of what is wrong, with the nearest name for an unknown key.
    """
    if isinstance(source, Path):
        tree, origin = yaml_tree.read(source), f"file {source}"
    else:
        tree, origin = yaml_tree.copy(source), "built in"
    _refuse_unknown(tree, _FileConfig, "", origin)
    sources = dict.fromkeys(yaml_tree.paths(tree), origin)
    table = settings()
    for flag, value in ({} if env is None else env).items():
        if flag.startswith(_PREFIX) and (name := flag[len(_PREFIX) :].lower()) in table:
            _put(tree, sources, table[name], value, f"environment {flag}")
    for name, given in ({} if flags is None else flags).items():
        if given is None:
            continue
        if name not in table:
            raise ConfigError(f"unknown flag --{name.replace('_', '-')}", "no setting has this name", _nearest(name, table))
        _put(tree, sources, table[name], given, f"flag --{name.replace('_', '-')}")
    bounds.check(tree, lambda path: sources.get(path, origin))
    try:
        return Resolved(config=_config(msgspec.convert(tree, _FileConfig)), sources=sources)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.strip("`").lstrip(".")
        raise ConfigError(f"{path or 'deployment'}: {what}", f"from {sources.get(path, origin)}", _allowed(path)) from None


def _check(ok: bool, what: str, why: str = "", hint: str = "") -> None:
    if not ok:
        raise ConfigError(what, why, hint)


def _struct_of(kind: Any) -> tuple[Any, bool]:
    """(struct type, whether in a list) of a field's type; (None, False) for a scalar."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind, False
    for part in getattr(kind, "__args__", ()):
        inner, _ = _struct_of(part)
        if inner is not None:
            return inner, True
    return None, False


def _choices(kind: Any) -> tuple[str, ...]:
    """The allowed words of a setting, which may also allow None; empty for a setting of another kind."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((choices for part in get_args(kind) if (choices := _choices(part))), ())


def _leaves(struct: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in msgspec.structs.fields(struct):
        inner, many = _struct_of(field.type)
        path = f"{prefix}{field.name}"
        if inner is ReplicaConfig or inner is None:
            yield path, field.type
        else:
            yield from _leaves(inner, f"{path}[]." if many else f"{path}.")


def _refuse_unknown(tree: Any, struct: Any, where: str, origin: str) -> None:
    if not isinstance(tree, dict):
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in fields:
            raise ConfigError(f"unknown key {path}", f"from {origin}", _nearest(str(key), fields))
        inner, many = _struct_of(fields[key])
        if inner is not None and many and isinstance(value, list):
            for index, item in enumerate(value):
                _refuse_unknown(item, inner, f"{path}[{index}].", origin)
        elif inner is not None:
            _refuse_unknown(value, inner, f"{path}.", origin)


def _nearest(key: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(names))}"


def _allowed(path: str) -> str:
    """The allowed values of a setting: the hint of an error."""
    kind = dict(_leaves(_FileConfig, "")).get(re.sub(r"\[\d+\]", "[]", path))
    if not (choices := _choices(kind)):
        return yaml_tree.EXAMPLE
    return f"a number, or {' or '.join(choices)}" if int in get_args(kind) else f"one of: {', '.join(choices)}"


def _put(tree: dict[str, Any], sources: dict[str, str], path: str, value: object, source: str) -> None:
    """Set one value, in every model for a model's setting; text from the environment is read as the field's type."""
    if path.startswith("models[]."):
        key = path.removeprefix("models[].")
        models: Sequence[Any] = tree.get("models", ()) if isinstance(tree.get("models"), list) else ()
        for index, model in enumerate(models):
            if isinstance(model, dict):
                _put_leaf(model, key, _FileModel, value, f"models[{index}].{key}", sources, source)
        return
    head, _, key = path.rpartition(".")
    if not head:
        _put_leaf(tree, key, _FileConfig, value, path, sources, source)
        return
    inner = tree.setdefault(head, {})
    struct, _ = _struct_of({field.name: field.type for field in msgspec.structs.fields(_FileConfig)}[head])
    if isinstance(inner, dict):
        _put_leaf(inner, key, struct, value, path, sources, source)


def _put_leaf(node: dict[str, Any], key: str, struct: Any, value: object, path: str, sources: dict[str, str], source: str) -> None:
    kind = {field.name: field.type for field in msgspec.structs.fields(struct)}[key]
    if kind == tuple[str, ...] and isinstance(value, str):
        value = _words(value)
    try:
        node[key] = msgspec.convert(value, int if key == "replicas" else kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}", f"from {source}", _allowed(path)) from None
    sources[path] = source


def _words(text: str) -> list[str]:
    """The list in a flag or a variable: separated by commas, or as JSON (like vLLM's flags)."""
    if text.lstrip().startswith("["):
        try:
            return msgspec.json.decode(text, type=list[str])
        except msgspec.DecodeError:
            pass  # the value stays a text, which is then refused
    return [word.strip() for word in text.split(",") if word.strip()]


def _rows(value: Any, path: str, sources: Mapping[str, str]) -> Iterator[ResolvedSetting]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _rows(item, f"{path}.{name}" if path else name, sources)
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _rows(item, f"{path}[{index}]", sources)
    else:
        yield ResolvedSetting(path=path, value=value, source=sources.get(path, "default"))
