"""Access lists of ``tcp://`` sockets: the table of public keys and their roles.

Owns the table in force. Never reads files (its caller does, and replaces the table when the file changes) and never sees a secret key.
The file is JSON: ``{"<public key in z85>": {"role": "replica", "name": "r0"}, ...}``; roles are ``replica``, ``client`` and ``router``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from orchestrator.auth.api_keys import Tenant
from workers.protocol.errors import ConfigError

Role = Literal["replica", "client", "router"]
#: Ending of a grant's name that allows all names with this prefix; the name of a single process contains no slash.
FAMILY = "/*"


class CurveGrant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rights of one key. ``name``: for a replica, the only name that it may send in Hello (empty = any; ``a/*`` = all that begin with
    ``a/``); for a client, its tenant. ``models``: for a replica, the models that it may serve; for a client, as in
    :class:`~orchestrator.auth.api_keys.Tenant`, like ``watches``."""

    role: Role
    name: str = ""
    models: tuple[str, ...] | None = None
    watches: bool = False

    def speaks_for(self, replica: str) -> bool:
        """Whether a replica with this key may have this name."""
        if self.name.endswith(FAMILY):
            return replica.startswith(self.name.removesuffix("*"))
        return self.name in ("", replica)


def parse_grants(data: bytes) -> dict[str, CurveGrant]:
    """Decode an allowed-keys file. Raises ConfigError, which never quotes the file."""
    try:
        grants = msgspec.json.decode(data, type=dict[str, CurveGrant])
    except msgspec.DecodeError as error:
        raise ConfigError("the allowed-keys file cannot be read", str(error)) from None
    if not all(len(key) == 40 and key.isascii() for key in grants):
        raise ConfigError("the allowed-keys file holds a key that is not 40 characters of z85")
    return grants


class CurveAcl:
    """The table in force. ZAP calls ``admits`` once per connection and the sockets once per message, so a removed key is refused at its
    next message."""

    def __init__(self, grants: Mapping[str, CurveGrant]) -> None:
        self._grants = dict(grants)

    def replace(self, grants: Mapping[str, CurveGrant]) -> None:
        self._grants = dict(grants)

    def admits(self, user: str, role: str) -> bool:
        grant = self._grants.get(user)
        return grant is not None and grant.role == role

    def tenant(self, user: str) -> Tenant:
        """The tenant of client ``user``; a tenant without rights if its key was just removed."""
        grant = self._grants.get(user)
        return Tenant(grant.name, grant.models, grant.watches) if grant is not None else Tenant(models=())

    def may_be(self, user: str, replica: str, model: str) -> bool:
        """Whether the key ``user`` may send messages as the replica of this name, and serve this model."""
        grant = self._grants.get(user)
        if grant is None or grant.role != "replica":
            return False
        return grant.speaks_for(replica) and (grant.models is None or model in grant.models)
