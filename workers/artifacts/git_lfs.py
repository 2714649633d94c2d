"""Git LFS pointers: small text files that a clone without Git LFS contains instead of the weights."""

from __future__ import annotations

from pathlib import Path

from workers.protocol.errors import ArtifactError

_HEAD = b"version https://git-lfs.github.com/spec/v1"
#: Number of a file's first bytes that :func:`refuse_pointer` reads.
HEAD_BYTES = len(_HEAD)


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises :class:`ArtifactError` when ``head``, the first bytes of ``path``, are those of a pointer."""
    if head[:HEAD_BYTES] == _HEAD:
        raise ArtifactError(
            f"{path} is a Git LFS pointer, not the file itself",
            "the folder was cloned without Git LFS",
            f"run `git lfs pull` in {path.parent}, or download the file",
        )
