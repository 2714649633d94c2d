"""Git LFS pointers: the small text files that lie where a clone without Git LFS left out the weights."""

from __future__ import annotations

from pathlib import Path

from workers.protocol.errors import ArtifactError

_HEAD = b"version https://git-lfs.github.com/spec/v1"
#: As many bytes of a file as :func:`refuse_pointer` looks at.
HEAD_BYTES = len(_HEAD)


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises :class:`ArtifactError` when ``head``, the first bytes of ``path``, are those of a pointer."""
    if head[:HEAD_BYTES] == _HEAD:
        raise ArtifactError(
            f"{path} is a Git LFS pointer, not the file itself",
            "the folder was cloned without Git LFS",
            f"run `git lfs pull` in {path.parent}, or download the file",
        )
