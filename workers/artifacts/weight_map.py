"""Maps each tensor of a Hugging Face folder to its safetensors file.

If there is an index, it decides: a copy of a tensor in another file is stale, and an unused entry may name a missing file. Without an
index, all parts of a numbered set belong together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import msgspec

from workers.artifacts.json_file import decode
from workers.artifacts.recognition import what_weights
from workers.artifacts.safetensors_file import COPY_AGAIN, SafetensorsFile
from workers.protocol.errors import ArtifactError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
#: Files that lie beside a model's weights and are not the model.
_BESIDE = ("adapter_model", "consolidated", "optimizer", "training_", "scheduler")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class WeightMap:
    """The tensors of a folder. ``names``: those that are there."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`ArtifactError` for pickled weights, for none at all, and for a file that is damaged."""
        self._folder = folder
        self._index, paths = _index(folder), _files(folder)
        self._files = [SafetensorsFile(path) for path in paths]
        self._holders: dict[str, list[SafetensorsFile]] = defaultdict(list)
        for file in self._files:
            for name in file.entries:
                self._holders[name].append(file)
        self.names = frozenset(self._holders)
        if not self.names:
            raise ArtifactError(f"{paths[0]} holds no tensors", "it is a safetensors file of none", COPY_AGAIN)

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds the tensor ``name``. Raises :class:`ArtifactError` when there is none, or nothing says which."""
        holders, assigned = self._holders.get(name, []), self._index.get(name)
        chosen = [file for file in holders if file.path.name == assigned] or holders
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            both = " and ".join(file.path.name for file in chosen[:2])
            raise ArtifactError(f"{self._folder}: {both} both hold {name}", "no index says which one is right", "delete the stale file")
        if assigned is not None and not (self._folder / assigned).exists():
            raise missing(self._folder / assigned, f"{INDEX} says that it holds {name}")
        raise KeyError(name)

    def largest(self) -> tuple[SafetensorsFile, str]:
        """(file, name) of the largest tensor."""
        sizes = ((file.size_of(name), name, file) for file in self._files for name in file.entries)
        _, name, file = max(sizes, key=lambda each: each[0])
        return file, name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.size_of(name) for file in self._files for name in file.entries)

    def release(self) -> None:
        for file in self._files:
            file.release()


def missing(path: Path, why: str) -> ArtifactError:
    """The error for a file of weights that is not there."""
    hint = "copy or download that file too"
    if any((path.parent / ".cache/huggingface/download").glob("*.incomplete")):
        hint = "its download did not finish: start it again"
    return ArtifactError(f"{path} is missing", why, hint)


def _index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        return {}
    index = decode(folder / INDEX, _Index).weight_map
    if outside := [name for name in index.values() if Path(name).name != name]:
        raise ArtifactError(f"{folder / INDEX} points outside the folder", outside[0], COPY_AGAIN)
    return index


def _files(folder: Path) -> list[Path]:
    listed = [folder / name for name in sorted(set(_index(folder).values()))]
    there = [path for path in listed if path.exists()]
    if there and all(path.suffix == ".safetensors" for path in there):
        return there
    if (folder / SINGLE).exists():
        # An index without a single file of its own is left over from an earlier save.
        return [folder / SINGLE]
    if listed and all(path.suffix == ".safetensors" for path in listed):
        raise missing(listed[0], f"{INDEX} lists it, and {len(listed)} files in all")
    found = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(_BESIDE)]
    if not found:
        raise what_weights(folder)
    return _whole_set(folder, found)


def _whole_set(folder: Path, found: list[Path]) -> list[Path]:
    """The files that belong together. Raises :class:`ArtifactError` when one of a numbered set is missing."""
    sets: dict[tuple[str, int], set[int]] = defaultdict(set)
    for path in found:
        if match := _NUMBERED.fullmatch(path.name):
            sets[match[1], int(match[3])].add(int(match[2]))
    if not sets:
        return found
    stem, count = max(sets, key=lambda each: (each[0] == "model", len(sets[each])))
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if absent := [name for name, number in zip(names, range(1, count + 1), strict=True) if number not in sets[stem, count]]:
        raise missing(folder / absent[0], f"the weights are split into {count} files")
    return [folder / name for name in names]
