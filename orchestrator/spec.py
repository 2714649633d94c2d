"""Vocabulary of the orchestrator: what one router process is told, as frozen values. Owns no state, imports only ``workers`` vocabulary."""

from __future__ import annotations

from typing import Literal

import msgspec

from workers.spec import RouterAddress


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that routers serve. ``tokenizer``: folder with ``tokenizer.json`` and ``tokenizer_config.json`` (chat template, eos).

    ``max_seq_len`` 0 = learn it from the replicas' Hello.
    """

    name: str
    tokenizer: str
    aliases: tuple[str, ...] = ()
    max_seq_len: int = 0
    created: int = 0


class HttpSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP door. ``reuse_port``: several routers share ``port``. ``port`` 0 = any free one, printed and put into the state file.

    ``api_keys_file``: whose keys open it; without one it is open to all, and on loopback only unless ``insecure_without_keys``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    reuse_port: bool = False
    max_body_bytes: int = 4 << 20
    api_keys_file: str = ""
    insecure_without_keys: bool = False


class AdmissionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds at the door: requests waiting for a replica, seconds they may wait, seconds a whole request may take (0 = no limit)."""

    max_queue: int = 512
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    max_n: int = 8
    replica_limit: int = 2


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that one router process needs; written as JSON (mode 0600) by ``up``.

    ``back`` is bound for replicas, ``rpc`` for clients: ``ipc://`` paths in a 0700 folder on one machine, ``tcp://`` with CURVE otherwise
    (``key_file``: this router's key pair; ``allowed_file``: public keys and roles that ZAP admits). ``state_file``: where the router
    reports (JSON, atomically): pid, phase, http address. ``salt_file``: key of the prefix-cache salt, the same for all routers.
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
    log_format: Literal["text", "json"] = "text"
