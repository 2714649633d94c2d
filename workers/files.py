"""Atomic writes: a file appears with its whole content or not at all. Owns no state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: Mode of a file that only its owner may read.
PRIVATE = 0o600


@contextmanager
def replacing(path: Path, *, mode: int = PRIVATE) -> Iterator[IO[bytes]]:
    """Create or replace ``path`` with the content written in the block: a reader finds the old content or the new one, never a part. If the
    block fails, the old file stays. ``mode`` is subject to the umask.

    Raises :class:`OSError`. The data is not flushed to the disk: after a crash of the host the file may be empty.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)  # an existing file of a killed process would keep its old mode
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as out:
            yield out
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)  # a partial file, for example after a full disk


def replace_file(path: Path, data: bytes, *, mode: int = PRIVATE) -> None:
    """Create or replace ``path`` as :func:`replacing` does, with ``data``."""
    with replacing(path, mode=mode) as out:
        out.write(data)
