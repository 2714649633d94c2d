"""Private files and folders of one user: made, replaced and read, with errors that name the file and never its content. Owns no state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from workers.files import replacing
from workers.protocol.errors import ConfigError, EnvironmentFault

#: The folder `deploy/`: example files of deployments, scripts, manifests. It is packaged with the code, so it exists without a repository.
SHIPPED = Path(__file__).with_name("deploy")


@contextmanager
def writing_private(path: Path) -> Iterator[IO[bytes]]:
    """Create or replace a file of mode 0600 with the content that is written in the block. Raises :class:`EnvironmentFault`."""
    try:
        with replacing(path) as out:
            yield out
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}", error.strerror or str(error), "make room or give access there, or choose another --run-dir"
        ) from None


def write_private(path: Path, data: bytes) -> None:
    """Create or replace a file of mode 0600 in one piece. Raises :class:`EnvironmentFault`."""
    with writing_private(path) as out:
        out.write(data)


def read_private(path: Path) -> bytes:
    """The bytes of a secret file. Raises :class:`ConfigError` when the file is missing or other users can read it."""
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(f"{path} is readable by others", f"its mode is {mode:04o}", f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        hint = "correct its path; `trireme keys` makes key files"
        raise ConfigError(f"cannot read the key file {path}", error.strerror or str(error), hint) from None


def make_private(folder: Path) -> Path:
    """Make a folder of mode 0700, or set that mode on one of this user. Raises :class:`EnvironmentFault` on a folder of another user."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if owner != os.geteuid():
            raise EnvironmentFault(f"{folder} belongs to another user", f"its owner is uid {owner}", "choose another --run-dir")
        folder.chmod(0o700)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {folder}", error.strerror or str(error), "choose another --run-dir") from None
    return folder
