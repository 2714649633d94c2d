"""F19, F20: shards that are damaged, gone, unreadable, of another layout, another build or another rank are refused by every rank at once.

Whole replicas: mpiexec and the ranks. That a start ends with this error, and what its three lines say, is tests/e2e/test_bad_input.py.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cli.main import run
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder
from tests.support.tiny_models import tiny_model
from workers.protocol.specs import PortableSpec

pytestmark = pytest.mark.mpi
SHARD = "rank1.safetensors"


@pytest.fixture(scope="module")
def builds() -> Iterator[Path]:
    """``tp2`` and ``tp4`` of one model, and ``other``: tp2 of a model of the same shape."""
    with short_folder() as folder:
        for name, seed in (("one", 0), ("two", 1)):
            tiny_model(folder / name, seed=seed)
        for name, source, size in (("tp2", "one", "2"), ("tp4", "one", "4"), ("other", "two", "2")):
            assert run(["--quiet", "convert", str(folder / source), "-o", str(folder / name), "-tp", size]) == 0
        yield folder


def flip(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def unreadable(folder: Path) -> None:
    """A folder in its place: mode 000 would not keep root out."""
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def swap(folder: Path) -> None:
    (folder / "rank0.safetensors").rename(folder / "aside")
    (folder / SHARD).rename(folder / "rank0.safetensors")
    (folder / "aside").rename(folder / SHARD)


def mix(folder: Path) -> None:
    shutil.copy(folder.parent / "other" / SHARD, folder / SHARD)


#: What is broken -> (the build that it is broken in, how, what the error names).
DAMAGE: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "F19 flipped bit": ("tp2", flip, (SHARD, "is damaged", "expected sha256")),
    "F19 truncated": ("tp2", truncate, (SHARD, "has another size", "expected")),
    "F19 missing": ("tp2", lambda folder: (folder / SHARD).unlink(), (SHARD, "is missing")),
    "F19 unreadable": ("tp2", unreadable, (SHARD,)),
    "F20 another layout": ("tp4", lambda folder: None, ("tp=4", "tp=2")),
    "F20 ranks swapped": ("tp2", swap, ("rank0.safetensors", "expected")),
    "F20 builds mixed": ("tp2", mix, (SHARD, "expected")),
}


#: Those that `make test` leaves to tests/workers/artifacts/test_checkpoint.py.
LONG = ("F19 truncated", "F19 missing", "F19 unreadable", "F20 ranks swapped", "F20 builds mixed")


@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.long) if what in LONG else what for what in DAMAGE])
def test_every_rank_ends_and_the_error_names_the_file(builds: Path, what: str) -> None:
    build, damage, told = DAMAGE[what]
    with short_folder() as folder:
        artifact = folder / "build"
        shutil.copytree(builds / build, artifact)
        (folder / "other").symlink_to(builds / "other")
        damage(artifact)
        with Gang(folder, [], tp=2, engine=PortableSpec(), artifact=str(artifact)) as gang:
            code = gang.wait_exit(90)
            gang.wait_gone()
            error = gang.state.error
            assert gang.state.phase == "failed" and error is not None and (code, error.exit_code) == (3, 3)
            figure(f"{what}: refused -> all ranks gone", time.time() - gang.state.since, 5.0)
            text = f"{error.what} {error.why}"
            assert all(word in text for word in told), text
