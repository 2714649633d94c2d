"""The secrets of one deployment: CURVE key pairs, who is allowed to use them, and the salt of the prefix cache.

Owns the ``keys`` folder (0700, files 0600). A secret never leaves these files but for the one replica it belongs to; none is logged or put
into argv or the environment. Keys outlive restarts, so that what still runs can find its routers again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from orchestrator.launch.gang import make_private, write_private
from orchestrator.router.admit import Grant, Role
from workers.errors import ConfigError

_SALT_BYTES = 32


class KeyPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A CURVE key pair, both halves in z85 (40 characters)."""

    public: str
    secret: str

    def __post_init__(self) -> None:
        if len(self.public) != 40 or len(self.secret) != 40:
            raise ConfigError("a CURVE key is not 40 characters of z85")

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def read_private(path: Path) -> bytes:
    """A secret file's bytes. Raises :class:`ConfigError` naming the file, never its content, when it is missing or readable by others."""
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(f"{path} is readable by others", f"its mode is {mode:04o}", f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}", error.strerror or str(error)) from None


class KeyRing:
    """The ``keys`` folder of a deployment. ``allowed_file`` and ``salt_file`` are what routers are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_private(folder)
        self.allowed_file = folder / "allowed.json"
        self.salt_file = folder / "salt"
        if self.salt_file.exists():
            if len(read_private(self.salt_file)) != _SALT_BYTES:
                raise ConfigError(
                    f"{self.salt_file} is not {_SALT_BYTES} bytes long", "", "remove the file: a new salt only empties the prefix caches"
                )
        else:
            write_private(self.salt_file, secrets.token_bytes(_SALT_BYTES))

    def path(self, role: Role, name: str) -> Path:
        return self.folder / f"{role}-{name}.json"

    def pair(self, role: Role, name: str) -> KeyPair:
        """The key pair of one process, made when it is first asked for. Raises :class:`ConfigError` on a file that is not one."""
        path = self.path(role, name)
        if path.exists():
            try:
                return msgspec.json.decode(read_private(path), type=KeyPair)
            except msgspec.DecodeError:
                raise ConfigError(f"{path} holds no CURVE key pair", "", "remove the file: a new pair is made") from None
        public, secret = zmq.curve_keypair()
        pair = KeyPair(public=public.decode(), secret=secret.decode())
        write_private(path, msgspec.json.encode(pair))
        return pair

    def allow(self, members: Sequence[tuple[Role, str]]) -> None:
        """Write the allowed-keys file for exactly these (role, name). A replica's key may speak for its own name only."""
        grants = {self.pair(role, name).public: Grant(role=role, name=name if role == "replica" else "") for role, name in members}
        write_private(self.allowed_file, msgspec.json.encode(grants))
