"""The secrets of one deployment: CURVE key pairs, who is allowed to use them, API keys, and the salt of the prefix cache.

Owns the ``keys`` folder (0700, files 0600) and API-keys files wherever they are. A secret leaves these files only for the replica that it
belongs to; none is logged or put into argv or the environment. Keys survive restarts, so that running replicas can reconnect to their
routers.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import zmq

from orchestrator.auth.api_keys import USUAL_TERMS, ApiKey, ApiKeyFile, KeyTerms, mint, parse_api_keys
from orchestrator.auth.curve_acl import FAMILY, CurveGrant, Role, parse_grants
from orchestrator.files import make_private, read_private, write_private
from workers.protocol.errors import ConfigError, NotFound, Rejected
from workers.serving.router_io import KeyPair

_SALT_BYTES = 32
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
#: The client key that `up` makes for commands on this machine.
LOCAL_CLIENT = "local"


def read_salt(path: Path) -> bytes:
    """The key of the prefix-cache salt. Raises :class:`ConfigError`."""
    salt = read_private(path)
    if len(salt) != _SALT_BYTES:
        raise ConfigError(f"{path} is not {_SALT_BYTES} bytes long", "", "remove the file: a new salt only empties the prefix caches")
    return salt


class JoinPass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pass: what a deployment needs so that its replicas can join routers of another deployment (JSON, mode 0600). ``replica``: the key
    pair of all its replicas, whose names begin with ``name``; ``client``: the key pair with which the deployment asks for their status.
    ``models``: None = all. ``server``: the public key of the routers, so that a wrong address is detected."""

    name: str
    server: str
    models: tuple[str, ...] | None
    replica: KeyPair
    client: KeyPair


def read_pass(path: Path) -> JoinPass:
    """Raises :class:`ConfigError` naming the file, never its content."""
    try:
        return msgspec.json.decode(read_private(path), type=JoinPass)
    except msgspec.DecodeError:
        raise ConfigError(f"{path} is no pass", "it is not what `trireme keys join` writes", "make one at the routers") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder for one writer, so that two commands at the same time do not lose each other's key."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Rejected(f"{name!r} is not usable as a name", hint="a name is 1 to 64 of a-z, 0-9, '.', '_' and '-'")


def _new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


def _lasting(grant: CurveGrant) -> bool:
    """Whether a user granted it by name; only a user revokes such a grant."""
    return grant.name.endswith(FAMILY) or (grant.role == "client" and bool(grant.name))


class ApiKeyRing:
    """An API-keys file. Routers that read it apply a change within two seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> tuple[ApiKey, ...]:
        """The stored part of each key; empty if there is no file. Raises :class:`ConfigError`."""
        return parse_api_keys(read_private(self.path)) if self.path.exists() else ()

    def add(self, tenant: str, models: Sequence[str], terms: KeyTerms = USUAL_TERMS) -> str:
        """Make a key for the tenant, restricted to ``models`` unless these are empty. Only this call returns it; the file keeps a hash."""
        _check_name(tenant)
        key, row = mint(tenant, tuple(models) or None, int(time.time()), terms)
        if not self.path.parent.exists():
            make_private(self.path.parent)
        with _alone(self.path.parent):
            self._write((*self.rows(), row))
        return key

    def revoke(self, which: str) -> list[ApiKey]:
        """Drop the key of this id, or all keys of this tenant, and return them. Raises :class:`NotFound` when there are none."""
        return self._change(which, lambda row: None)

    def change(self, which: str, terms: Callable[[KeyTerms], KeyTerms]) -> list[ApiKey]:
        """Give other terms to the key of this id, or to all keys of this tenant, and return them as they were. Raises :class:`NotFound`
        when there are none, and what ``terms`` raises."""
        return self._change(which, lambda row: msgspec.structs.replace(row, terms=terms(row.terms)))

    def _change(self, which: str, change: Callable[[ApiKey], ApiKey | None]) -> list[ApiKey]:
        if not self.path.exists():
            raise NotFound(f"there is no API-keys file {self.path}")
        with _alone(self.path.parent):
            rows = self.rows()
            meant = [row for row in rows if which in (row.id, row.tenant)]
            if not meant:
                raise NotFound(f"{self.path} has no key {which!r}", hint="trireme keys api list")
            changed = [change(row) if row in meant else row for row in rows]
            self._write(tuple(row for row in changed if row is not None))
        return meant

    def _write(self, rows: tuple[ApiKey, ...]) -> None:
        write_private(self.path, msgspec.json.encode(ApiKeyFile(keys=rows)))


class KeyRing:
    """The ``keys`` folder of a deployment. ``allowed_file`` and ``salt_file`` are what routers read."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_private(folder)
        self.allowed_file = folder / "allowed.json"
        self.salt_file = folder / "salt"
        if self.salt_file.exists():
            read_salt(self.salt_file)
        else:
            write_private(self.salt_file, secrets.token_bytes(_SALT_BYTES))

    def path(self, role: Role | Literal["pass"], name: str) -> Path:
        return self.folder / f"{role}-{name}.json"

    def pair(self, role: Role, name: str) -> KeyPair:
        """The key pair of one process, made at the first call. Raises :class:`ConfigError` on a file that is not one."""
        path = self.path(role, name)
        if path.exists():
            try:
                return msgspec.json.decode(read_private(path), type=KeyPair)
            except msgspec.DecodeError:
                raise ConfigError(f"{path} holds no CURVE key pair", "", "remove the file: a new pair is made") from None
        pair = _new_pair()
        write_private(path, msgspec.json.encode(pair))
        return pair

    def allow(self, members: Sequence[tuple[Role, str]], models: Mapping[str, str] | None = None) -> None:
        """Write the allowed-keys file for exactly these (role, name), the clients that were admitted by name, and the passes. A replica's
        key allows only its own name, and only the model that ``models`` gives for this name (any model without an entry)."""
        grants: dict[str, CurveGrant] = {}
        for role, name in members:
            own, served = (name, (models or {}).get(name)) if role == "replica" else ("", None)
            grants[self.pair(role, name).public] = CurveGrant(role=role, name=own, models=None if served is None else (served,))
        with _alone(self.folder):
            self._write(grants | {key: grant for key, grant in self.grants().items() if _lasting(grant)})

    def grants(self) -> dict[str, CurveGrant]:
        """The allowed-keys file as it is. Raises :class:`ConfigError`."""
        return parse_grants(read_private(self.allowed_file)) if self.allowed_file.exists() else {}

    def admit_client(self, name: str, models: Sequence[str]) -> Path:
        """Authorize a client of this name (which is its tenant), restricted to ``models`` unless these are empty; returns its key-pair
        file."""
        self._check_client(name)
        pair = self.pair("client", name)
        with _alone(self.folder):
            self._write(self.grants() | {pair.public: CurveGrant(role="client", name=name, models=tuple(models) or None)})
        return self.path("client", name)

    def remove_client(self, name: str) -> None:
        """Take a client off the list and remove its key pair. Raises :class:`NotFound`."""
        self._check_client(name)
        with _alone(self.folder):
            grants = self.grants()
            left = {key: grant for key, grant in grants.items() if (grant.role, grant.name) != ("client", name)}
            if len(left) == len(grants):
                raise NotFound(f"no client {name!r} is allowed", hint="trireme keys show")
            self._write(left)
        self.path("client", name).unlink(missing_ok=True)

    def admit_replicas(self, name: str, models: Sequence[str]) -> Path:
        """Authorize replicas of another deployment to serve ``models`` (empty = all), and return the pass for that deployment. An existing
        pass keeps its keys and gets these models."""
        _check_name(name)
        path = self.path("pass", name)
        bound = tuple(models) or None
        old = read_pass(path) if path.exists() else None
        made = JoinPass(
            name=name,
            server=self.pair("router", "all").public,
            models=bound,
            replica=old.replica if old else _new_pair(),
            client=old.client if old else _new_pair(),
        )
        family = name + FAMILY
        grants = {
            made.replica.public: CurveGrant(role="replica", name=family, models=bound),
            made.client.public: CurveGrant(role="client", name=family, models=bound, watches=True),
        }
        with _alone(self.folder):
            self._write(self.grants() | grants)
        write_private(path, msgspec.json.encode(made))
        return path

    def remove_pass(self, name: str) -> None:
        """Take a pass off the list and remove it: its replicas are lost to the routers within two seconds. Raises :class:`NotFound`."""
        _check_name(name)
        with _alone(self.folder):
            grants = self.grants()
            left = {key: grant for key, grant in grants.items() if grant.name != name + FAMILY}
            if len(left) == len(grants):
                raise NotFound(f"no pass {name!r} is allowed", hint="trireme keys show")
            self._write(left)
        self.path("pass", name).unlink(missing_ok=True)

    def _write(self, grants: dict[str, CurveGrant]) -> None:
        write_private(self.allowed_file, msgspec.json.encode(grants))

    @staticmethod
    def _check_client(name: str) -> None:
        _check_name(name)
        if name == LOCAL_CLIENT:
            raise Rejected(f"the client {LOCAL_CLIENT!r} is the deployment's own", hint="choose another name")
