"""Files that appear whole or not at all. Owns no state."""

from __future__ import annotations

import os
from pathlib import Path

#: Mode of a file that only its owner may read.
PRIVATE = 0o600


def replace_file(path: Path, data: bytes, *, mode: int = PRIVATE) -> None:
    """Create or replace ``path``: a reader finds the old content or the new one, never a part. ``mode`` is subject to the umask.

    Raises :class:`OSError`. The data is not flushed to the disk: after a crash of the host the file may be empty.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)  # a file that a killed process left would keep its own mode
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as out:
        out.write(data)
    os.replace(fresh, path)
