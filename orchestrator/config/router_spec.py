"""Frozen values that one router process is started with. Owns no state, imports only :mod:`workers.protocol`."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import RouterAddress

#: Addresses that mean every interface of this host: a process can listen on them, but nobody can connect to them.
WILDCARDS = ("0.0.0.0", "::", "*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


#: Source of the defaults of requests: a model's ``generation_config.json``, or only the API.
GenerationConfig = Literal["auto", "none"]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that routers serve. ``tokenizer``: folder with ``tokenizer.json`` and ``tokenizer_config.json`` (chat template, eos).

    ``chat_template``: a file with the template to use in place of the folder's. ``max_seq_len`` 0 = learn it from the replicas' Hello.
    ``generation_config``: whether ``generation_config.json`` of that folder gives the defaults of requests.
    """

    name: str
    tokenizer: str
    chat_template: str = ""
    aliases: tuple[str, ...] = ()
    max_seq_len: int = 0
    created: int = 0
    generation_config: GenerationConfig = "auto"


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS of the HTTP API, all in PEM: the certificate with those of its issuers, its key, and what client certificates must be issued by;
    without ``client_ca`` clients need none."""

    cert: str
    key: str
    client_ca: str = ""

    def __post_init__(self) -> None:
        for name in ("cert", "key"):
            if not getattr(self, name):
                raise ConfigError(f"http.tls.{name}: is missing", "a certificate and its key belong together", f"name a PEM file in {name}")


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server of every router; ``port`` 0 = any free one, printed and put into the state file. ``api_keys_file``: the keys that it
    accepts (`trireme keys api`); without it the API is open to all and listens on loopback only. ``allowed_origins``: the web pages whose
    scripts may use it (CORS), such as ``https://chat.example.org``; ``*`` = all, empty = none. ``trusted_proxies``: addresses and networks
    of reverse proxies, which are believed when they name the client's address (``Forwarded``, ``X-Forwarded-For``)."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 4 << 20
    api_keys_file: str = ""
    allowed_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    tls: TlsConfig | None = None

    def __post_init__(self) -> None:
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                why = str(error)
                raise ConfigError(f"http.trusted_proxies: {proxy!r} is no address", why, "such as 10.0.0.7 or 10.0.0.0/8") from None
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"http.allowed_origins: {origin!r} is no origin", "an origin is a scheme, a host and a port, without a path",
                    "such as https://chat.example.org or http://localhost:3000; '*' = all",
                )  # fmt: skip

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in _LOOPBACK


class HttpSpec(HttpConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server of one router. ``reuse_port``: several routers share ``port``. ``insecure_without_keys``: it may be reached from
    other machines without keys (and without TLS); ``insecure_without_tls``: without TLS."""

    reuse_port: bool = False
    insecure_without_keys: bool = False
    insecure_without_tls: bool = False


class BackSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The addresses on which routers listen for replicas, by ``tcp`` with CURVE: router i on ``port`` + i. No ``host``: `up` chooses, for
    its own replicas.

    ``advertise``: the address at which others reach this host, if it differs from ``host``.
    """

    host: str = ""
    port: int = 8200
    advertise: str = ""

    def __post_init__(self) -> None:
        if self.host in WILDCARDS and not self.advertise:
            raise ConfigError("back.advertise: is missing", f"nobody can connect to {self.host}", "name an address that replicas reach")

    @property
    def known_as(self) -> str:
        return self.advertise or self.host


class JoinSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Standing routers that the replicas join; no routers are started. ``file``: the ``join.json`` of those routers; ``key_file``: the pass
    that was made at those routers (`trireme keys join`)."""

    file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if bool(self.file) != bool(self.key_file):
            missing = "key_file" if self.file else "file"
            raise ConfigError(
                f"join.{missing}: is missing", "both are needed", "trireme keys join NAME, at the routers, prints the pass's path"
            )


class AdmissionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of admission: choices waiting for a replica (a request has ``n`` of them), seconds they may wait, seconds a whole request may
    take (0 = no limit).

    ``max_requests``, ``max_bytes``: requests of a router that have not ended, and the bytes of their bodies. ``max_queued_tokens``: prompt
    tokens of the choices that wait for a replica. ``tenant_share``: how much of each bound one tenant may take.
    """

    max_queue: int = 512
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    max_n: int = 8
    replica_limit: int = 2
    max_requests: int = 32768
    max_bytes: int = 512 << 20
    max_queued_tokens: int = 4 << 20
    tenant_share: float = 0.25

    def share_of(self, total: int) -> int:
        """What one tenant may take of ``total``."""
        return int(total * self.tenant_share)


class MetricsSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port for Prometheus only: router i on ``port`` + i. 0 = none: then only the HTTP API has ``/metrics``, and if several routers share
    its port, each scrape may reach a different router."""

    host: str = "127.0.0.1"
    port: int = 0


class TracingSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Traces by OTLP over HTTP. ``endpoint``: a collector's URL, such as ``http://127.0.0.1:4318/v1/traces``; empty = no traces.
    ``sample``: share of the requests that begin a trace here; for a request with ``traceparent``, that header decides."""

    endpoint: str = ""
    sample: float = 1.0

    def __post_init__(self) -> None:
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError("tracing.endpoint: is no URL", self.endpoint, "such as http://127.0.0.1:4318/v1/traces")


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that one router process needs; written as JSON (mode 0600) by ``up``.

    ``back`` is bound for replicas, ``rpc`` for clients: ``ipc://`` paths in a 0700 folder on one machine, ``tcp://`` with CURVE otherwise
    (``key_file``: this router's key pair; ``allowed_file``: public keys and roles that ZAP admits). ``state_file``: file to which the
    router writes (JSON, atomically) pid, phase and http address. ``salt_file``: key of the prefix-cache salt, the same for all routers.
    ``drain_grace_s``: seconds that running requests have after the order to end.
    """

    name: str
    back: str
    rpc: str
    models: tuple[ModelCard, ...]
    http: HttpSpec | None = HttpSpec()
    admission: AdmissionSpec = AdmissionSpec()
    peers: tuple[RouterAddress, ...] = ()
    key_file: str = ""
    allowed_file: str = ""
    salt_file: str = ""
    state_file: str = ""
    heartbeat_s: float = 0.2
    replica_timeout_s: float = 2.0
    hang_floor_s: float = 10.0
    drain_grace_s: float = 30.0
    log_format: Literal["text", "json"] = "text"
    metrics: MetricsSpec = MetricsSpec()
    tracing: TracingSpec = TracingSpec()
