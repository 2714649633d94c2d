"""The catalogue of built engines: one folder each, whose name contains everything on which the engine depends.

Owns the folder ``engines`` of the cache, which is the catalogue. Must never touch a folder that is not an engine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from workers.artifacts.atomic_folder import locked
from workers.engines.trtllm.engine_dir import EngineDir, is_engine_dir, read_engine_dir
from workers.protocol.errors import ArtifactError, EnvironmentFault, NotFound, Rejected

#: Longest that :func:`remove` waits for a build of the same engine, seconds.
REMOVE_S = 60.0


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One folder of the catalogue; ``error`` says what is wrong if ``engine`` is None."""

    name: str
    path: Path
    engine: EngineDir | None
    error: str = ""


def folder(cache: Path) -> Path:
    return cache / "engines"


def entries(cache: Path) -> list[CatalogueEntry]:
    """Every engine, by name; damaged ones too."""
    root = folder(cache)
    paths = sorted(path for path in root.iterdir() if is_engine_dir(path) and not path.name.startswith(".")) if root.is_dir() else []
    return [_entry(path) for path in paths]


def _entry(path: Path) -> CatalogueEntry:
    try:
        return CatalogueEntry(name=path.name, path=path, engine=read_engine_dir(path))
    except ArtifactError as error:
        return CatalogueEntry(name=path.name, path=path, engine=None, error=str(error))


def find(cache: Path, name: str) -> Path:
    """The folder for a name: a name in the catalogue, the beginning of one, or a path.

    Raises :class:`NotFound` if there is none, :class:`Rejected` if several names begin like this.
    """
    names = [entry.name for entry in entries(cache)]
    chosen = [known for known in names if known == name] or [known for known in names if known.startswith(name)]
    if len(chosen) == 1:
        return folder(cache) / chosen[0]
    if chosen:
        raise Rejected(f"several engines are called {name}...", ", ".join(chosen), "give more of the name")
    if is_engine_dir(name):
        return Path(name)
    raise NotFound(f"there is no engine {name}", f"the catalogue is {folder(cache)}", "trireme engines list names them; a path will do too")


def remove(path: Path) -> int:
    """Delete an engine folder and return its bytes. Waits for a running build of it.

    Raises :class:`ArtifactError` for any other folder.
    """
    with locked(path.parent / f"{path.name}.lock", REMOVE_S):
        if not is_engine_dir(path):
            raise ArtifactError(f"{path} is not an engine", "nothing was deleted", "give a folder that `trireme build` made")
        total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        trash = path.with_name(f".{path.name}.old")
        try:
            # First take it out of the catalogue: an interrupted removal must not leave a folder that looks complete.
            shutil.rmtree(trash, ignore_errors=True)
            path.rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be deleted", error.strerror or str(error), "give access to it") from None
    return total
