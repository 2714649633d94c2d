"""Deployment YAML, flags and environment -> frozen structs, with the source of every value.

Owns what a deployment file may say, and the process's environment: nothing below layer 5 but this module reads it. Keys are the long flags
with underscores. Precedence: flag > environment (``TRIREME_*``) > file > default. Must never start anything or look at a model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from orchestrator.spec import AdmissionSpec
from workers.errors import ConfigError
from workers.spec import DType, EngineSpec, Parallel, WaitPolicy

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,38}[a-z0-9])?")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PREFIX = "TRIREME_"
DEFAULT_RUN_DIR = "~/.local/state/trireme"


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP door of every router; ``port`` 0 = any free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 4 << 20


class RpcConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ZeroMQ door. No ``host``: a Unix socket in the run folder. Else ``tcp`` with CURVE; router i listens on ``port`` + i."""

    host: str = ""
    port: int = 8100


class RayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``address`` of a cluster to join (``RAY_ADDRESS`` counts too); empty = start one here that ends with us, with ``num_cpus`` CPU shares
    (0 = one a rank and one for the controller) and ``num_gpus`` GPUs (-1 = those that Ray finds)."""

    address: str = ""
    num_cpus: int = 0
    num_gpus: int = -1


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One gang of ``tp_size`` x ``pp_size`` ranks; 0 = the model's own value."""

    name: str = ""
    tp_size: int = 0
    pp_size: int = 0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One served model. ``path``: catalogue name, Hugging Face folder, GGUF or checkpoint; empty = ``name``.

    ``replicas``: how many of ``tp_size`` x ``pp_size``, or a list that says it for each. ``spread``: a node of its own for each pipeline
    stage. The rest is :class:`~workers.spec.EngineSpec`.
    """

    name: str
    path: str = ""
    aliases: tuple[str, ...] = ()
    replicas: int | tuple[ReplicaConfig, ...] = 1
    tp_size: int = 1
    pp_size: int = 1
    spread: bool = False
    cpus_per_rank: float = 1.0
    engine: Literal["portable", "fake", "trtllm"] = "portable"
    dtype: DType = "fp32"
    max_batch_size: int = 64
    max_num_tokens: int = 256
    max_seq_len: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    block_size: int = 16
    prefix_cache: bool = True
    deterministic: bool = False
    fixed_shape: bool = False
    wait: WaitPolicy = "hybrid"
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    fake_step_ms: float = 1.0
    fake_token_us: float = 0.0

    def engine_spec(self) -> EngineSpec:
        names = set(EngineSpec.__struct_fields__) & set(self.__struct_fields__)
        return EngineSpec(kind=self.engine, **{name: getattr(self, name) for name in names})

    def gangs(self) -> list[tuple[str, Parallel]]:
        """(replica name, layout), in file order; replicas without a name are numbered."""
        base = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")[:32]
        rows = (ReplicaConfig(),) * self.replicas if isinstance(self.replicas, int) else self.replicas
        return [
            (row.name or f"{base}-{index}", Parallel(tp=row.tp_size or self.tp_size, pp=row.pp_size or self.pp_size))
            for index, row in enumerate(rows)
        ]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole deployment. Times in seconds. ``run_dir``: sockets, keys, logs and state (0700); ``cache_dir``: models."""

    models: tuple[ModelConfig, ...]
    name: str = "local"
    http: HttpConfig = HttpConfig()
    rpc: RpcConfig = RpcConfig()
    routers: int = 1
    launcher: Literal["ray", "local"] = "ray"
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

    def __post_init__(self) -> None:
        _check(_NAME.fullmatch(self.name) is not None, f"name: {self.name!r} is not usable", "a name is 1 to 40 of a-z, 0-9, '.' and '-'")
        _check(bool(self.models), "models: there is none", "", "name at least one model")
        _check(1 <= self.routers <= 64, f"routers: must be in 1..64, got {self.routers}")
        _check(0 <= self.http.port < 65536, f"http.port: {self.http.port} is no port")
        why = "clients are not authenticated yet, so the HTTP door stays on this host"
        _check(
            self.http.host in _LOOPBACK,
            f"http.host: {self.http.host} is not a loopback address",
            why,
            "put an authenticating proxy in front",
        )
        _check(self.routers == 1 or self.http.port > 0, "http.port: several routers share one port, so it cannot be 0")
        for name in ("heartbeat_s", "replica_timeout_s", "hang_floor_s", "start_timeout_s"):
            _check(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        _check(self.replica_timeout_s > 2 * self.heartbeat_s, "replica_timeout_s: must be more than two heartbeats")
        self._check_models()

    def _check_models(self) -> None:
        seen: set[tuple[str, str]] = set()
        for index, model in enumerate(self.models):
            where = f"models[{index}]"
            _check(bool(model.name), f"{where}.name: is empty")
            count = model.replicas if isinstance(model.replicas, int) else len(model.replicas)
            _check(1 <= count <= 256, f"{where}.replicas: must be in 1..256, got {count}")
            for label in (model.name, *model.aliases):
                _check(("model", label) not in seen, f"{where}: the model name {label} is used twice")
                seen.add(("model", label))
            try:
                model.engine_spec()
                gangs = model.gangs()
            except ConfigError as error:
                raise ConfigError(f"{where}: {error.what}", error.why, error.hint) from None
            for name, _ in gangs:
                _check(_NAME.fullmatch(name) is not None, f"{where}.replicas: the name {name!r} is not usable", "use a-z, 0-9, '.' and '-'")
                _check(("replica", name) not in seen, f"{where}.replicas: the name {name} is used twice")
                seen.add(("replica", name))

    @property
    def home(self) -> Path:
        """The folder of this deployment: ``run_dir``/``name``."""
        return Path(self.run_dir).expanduser().absolute() / self.name

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir).expanduser().absolute()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved setting, for ``config show --resolved``."""

    path: str
    value: object
    source: str


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration and where each of its values came from (by path, ``models[0].dtype``; what is not listed is a default)."""

    config: Config
    sources: dict[str, str]

    def rows(self) -> list[Row]:
        return list(_rows(self.config, "", self.sources))


def environment() -> MutableMapping[str, str]:
    """The process's environment: the one door to it below layer 5."""
    return os.environ


def settings() -> dict[str, str]:
    """Every flag name (underscores) -> its path; those of a model apply to all models: ``tp_size`` -> ``models[].tp_size``."""
    table = {"host": "http.host", "port": "http.port"}
    for path, kind in _leaves(Config, ""):
        if kind in (str, int, float, bool) or _is_literal(kind):
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
        tree, origin = _read(source), f"file {source}"
    else:
        tree, origin = _copy(source), "built in"
    _refuse_unknown(tree, Config, "")
    sources = dict.fromkeys(_paths(tree, ""), origin)
    table = settings()
    for flag, value in ({} if env is None else env).items():
        if flag.startswith(_PREFIX) and (name := flag[len(_PREFIX) :].lower()) in table:
            _put(tree, sources, table[name], value, f"environment {flag}")
    for name, given in ({} if flags is None else flags).items():
        if given is None:
            continue
        if name not in table:
            raise ConfigError(f"unknown flag --{name.replace('_', '-')}", "", _nearest(name, table))
        _put(tree, sources, table[name], given, f"flag --{name.replace('_', '-')}")
    try:
        return Resolved(config=msgspec.convert(tree, Config), sources=sources)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise ConfigError(
            f"{path.strip('`').lstrip('.') or 'deployment'}: {what}", sources.get(path.strip("`").lstrip("."), origin)
        ) from None


def _check(ok: bool, what: str, why: str = "", hint: str = "") -> None:
    if not ok:
        raise ConfigError(what, why, hint)


class _Loader(yaml.SafeLoader):
    """Safe, and refuses a key that stands twice: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML", " ".join(str(error).split())[:300]) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping", "a deployment file is a YAML mapping with `models` in it")
    return tree


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _struct_of(kind: Any) -> tuple[Any, bool]:
    """(struct type, whether in a list) that a field's type holds; (None, False) for a scalar."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind, False
    for part in getattr(kind, "__args__", ()):
        inner, _ = _struct_of(part)
        if inner is not None:
            return inner, True
    return None, False


def _is_literal(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is Literal


def _leaves(struct: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in msgspec.structs.fields(struct):
        inner, many = _struct_of(field.type)
        path = f"{prefix}{field.name}"
        if inner is ReplicaConfig or inner is None:
            yield path, field.type
        else:
            yield from _leaves(inner, f"{path}[]." if many else f"{path}.")


def _refuse_unknown(tree: Any, struct: Any, where: str) -> None:
    if not isinstance(tree, dict):
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in fields:
            raise ConfigError(f"unknown key {path}", "", _nearest(str(key), fields))
        inner, many = _struct_of(fields[key])
        if inner is not None and many and isinstance(value, list):
            for index, item in enumerate(value):
                _refuse_unknown(item, inner, f"{path}[{index}].")
        elif inner is not None:
            _refuse_unknown(value, inner, f"{path}.")


def _nearest(key: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(names))}"


def _paths(tree: Any, path: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _paths(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from _paths(value, f"{path}[{index}]")
    else:
        yield path


def _put(tree: dict[str, Any], sources: dict[str, str], path: str, value: object, source: str) -> None:
    """Set one value, in every model for a model's setting; text from the environment is read as the field's type."""
    if path.startswith("models[]."):
        key = path.removeprefix("models[].")
        models: Sequence[Any] = tree.get("models", ()) if isinstance(tree.get("models"), list) else ()
        for index, model in enumerate(models):
            if isinstance(model, dict):
                _put_leaf(model, key, ModelConfig, value, f"models[{index}].{key}", sources, source)
        return
    head, _, key = path.rpartition(".")
    if not head:
        _put_leaf(tree, key, Config, value, path, sources, source)
        return
    inner = tree.setdefault(head, {})
    struct, _ = _struct_of({field.name: field.type for field in msgspec.structs.fields(Config)}[head])
    if isinstance(inner, dict):
        _put_leaf(inner, key, struct, value, path, sources, source)


def _put_leaf(node: dict[str, Any], key: str, struct: Any, value: object, path: str, sources: dict[str, str], source: str) -> None:
    kind = {field.name: field.type for field in msgspec.structs.fields(struct)}[key]
    try:
        node[key] = msgspec.convert(value, int if key == "replicas" else kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}", f"from {source}") from None
    sources[path] = source


def _rows(value: Any, path: str, sources: Mapping[str, str]) -> Iterator[Row]:
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _rows(getattr(value, name), f"{path}.{name}" if path else name, sources)
    elif isinstance(value, tuple) and any(isinstance(item, msgspec.Struct) for item in value):
        for index, item in enumerate(value):
            yield from _rows(item, f"{path}[{index}]", sources)
    else:
        yield Row(path=path, value=value, source=sources.get(path, "default"))
