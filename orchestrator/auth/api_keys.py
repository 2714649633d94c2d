"""Identities and their rights: API keys of HTTP clients, tenants, and the salt that separates the tenants' prefix caches.

Owns the table of API keys in force, which holds hashes only. Never reads files (its caller does, and replaces the table when the file
changes), and never keeps, logs or returns a key that a client sent.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from workers.protocol.errors import ConfigError

_PREFIX = "trireme-"
_ID_BYTES, _SECRET_BYTES, _SALT_BYTES = 6, 32, 16


Limit: TypeAlias = Annotated[int, Meta(ge=1, le=10**12)]
Weight: TypeAlias = Annotated[float, Meta(ge=0.001, le=1000)]
Priority: TypeAlias = Annotated[int, Meta(ge=-9, le=9)]


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one key may take: requests and tokens in any minute, requests at once; None = as much as there is."""

    rpm: Limit | None = None
    tpm: Limit | None = None
    concurrency: Limit | None = None

    @property
    def shared(self) -> bool:
        """Whether there is a limit at all that the routers keep together."""
        return self.rpm is not None or self.tpm is not None or self.concurrency is not None


class KeyTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How the requests of a key are served: its limits, its tenant's weight in the order, and the smallest priority that they may have."""

    limits: KeyLimits = KeyLimits()
    weight: Weight = 1.0
    most_urgent: Priority = 0


#: Of a key for which nothing else is said.
USUAL_TERMS = KeyTerms()


class Tenant(msgspec.Struct, frozen=True):
    """The tenant of a request. ``models``: names or aliases that it may use and see; None = all. ``watches``: it may read the status of the
    whole deployment although it is restricted to some models; a tenant without such a restriction always may. ``terms``: those of its key.
    ``key``: the id of its API key; empty = it has none."""

    name: str = ""
    models: tuple[str, ...] | None = None
    watches: bool = False
    terms: KeyTerms = USUAL_TERMS
    key: str = ""

    @property
    def sees_all(self) -> bool:
        """Whether the answer may name models of all tenants."""
        return self.models is None or self.watches

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model of these names is among those allowed."""
        return self.models is None or any(name in self.models for name in names)


#: Without keys, all clients are one tenant that may use every model.
EVERYONE = Tenant(terms=KeyTerms(most_urgent=-9))


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stored part of a key. ``hash``: SHA-256 over ``salt`` and the whole key, both in hex; ``id`` is a part of the key that is not
    secret.

    A key has 256 random bits, so it cannot be guessed even with a hash as fast as SHA-256.
    """

    id: str
    tenant: str
    salt: str
    hash: str
    models: tuple[str, ...] | None = None
    created: int = 0
    terms: KeyTerms = USUAL_TERMS


class ApiKeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of an API-keys file (JSON)."""

    keys: tuple[ApiKey, ...] = ()


def mint(tenant: str, models: tuple[str, ...] | None, created: int, terms: KeyTerms = USUAL_TERMS) -> tuple[str, ApiKey]:
    """(a new key, its stored part)."""
    id = secrets.token_hex(_ID_BYTES)
    key = f"{_PREFIX}{id}-{secrets.token_hex(_SECRET_BYTES)}"
    salt = secrets.token_hex(_SALT_BYTES)
    return key, ApiKey(id=id, tenant=tenant, salt=salt, hash=_hash(salt, key), models=models, created=created, terms=terms)


def parse_api_keys(data: bytes) -> tuple[ApiKey, ...]:
    """Decode an API-keys file. Raises ConfigError, which never quotes the file."""
    try:
        return msgspec.json.decode(data, type=ApiKeyFile).keys
    except msgspec.DecodeError:
        raise ConfigError("the API-keys file cannot be read", "it is not what `trireme keys api` writes") from None


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode()).hexdigest()


class ApiKeys:
    """The table in force."""

    #: Compared in place of a key that does not exist, so that an unknown id takes as long as a wrong secret.
    _NOBODY = ApiKey(id="", tenant="", salt="0" * 2 * _SALT_BYTES, hash="0" * 64)

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.id: key for key in keys}

    def tenant(self, authorization: str) -> Tenant | None:
        """The tenant of a request with this ``Authorization`` header ("" = none); None unless it is ``Bearer`` and a key in force."""
        scheme, _, given = authorization.partition(" ")
        given = given.strip()
        id = given.removeprefix(_PREFIX).partition("-")[0]
        known = self._keys.get(id, self._NOBODY)
        right = hmac.compare_digest(_hash(known.salt, given), known.hash)
        if not right or known is self._NOBODY or scheme.lower() != "bearer":
            return None
        return Tenant(known.tenant, known.models, terms=known.terms, key=known.id)


class Salting:
    """Makes the salt of the prefix cache: HMAC over tenant and the client's own salt with the deployment's key, the same at every router.

    Replicas and the routing core identify a prefix by this salt, so a tenant never hits blocks that another tenant computed.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, tenant: str, given: str) -> str:
        # The length in front keeps ("a", "bc") and ("ab", "c") apart.
        return hmac.digest(self._key, f"{len(tenant)}:{tenant}{given}".encode(), "sha256")[:16].hex()
