"""Hub ids (``ORG/NAME[:GGUF][@REVISION]``) and the choice of the files that a model needs.

Knows names of files, never their content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import msgspec

from workers.protocol.errors import ArtifactError, Rejected

#: One organization or user, one name; with a leading '.', '/' or '~' the text is a path.
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^@:]+))?(?:@([^\s:]+))?")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
#: Parts of the name of a GGUF that is not a complete model.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
#: JSON files that no replica reads, such as descriptions of weights in other formats.
_OTHER_JSON = re.compile(r"(pytorch_model|tf_model|flax_model)\S*\.index\.json|params\.json|trainer_state\.json|\S*results\.json")
_TEMPLATES = "additional_chat_templates"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
#: Number of names in an error message.
_SHOWN = 12


class HubReference(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a hub. ``file``: a GGUF's name or its quantization; ``revision``: branch, tag or commit. Both may be empty."""

    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return self.repo + (f":{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


class NeededFiles(NamedTuple):
    """``names``: the files to fetch; ``model``: the one that is the model, empty if the folder is the model."""

    names: list[str]
    model: str = ""


def parse(text: str) -> HubReference | None:
    """The hub id in ``text``; None if it has another form, or is a file's name (``folder/model.gguf``)."""
    match = _ID.fullmatch(text)
    if match is None or match[1].lower().endswith((".gguf", ".safetensors")):
        return None
    repo, file, revision = match.groups(default="")
    return HubReference(repo=repo, file=file, revision=revision)


def at_revision(model: str, revision: str) -> str:
    """The model ``model`` at ``revision``; unchanged if ``revision`` is empty. Raises :class:`Rejected` if the model has no revisions, or
    names another one."""
    if not revision:
        return model
    reference = parse(model)
    if reference is None:
        raise Rejected(f"--revision {revision} means nothing for {model}", "only models on a hub have revisions", "leave it out")
    if reference.revision not in ("", revision):
        raise Rejected(f"{model} and --revision {revision} name two revisions", hint="give one of them")
    return str(msgspec.structs.replace(reference, revision=revision))


def needed_files(reference: HubReference, names: Sequence[str], *, weights: bool = True) -> NeededFiles:
    """The repository's files that a replica of ``reference`` loads. Without ``weights``: only the files that routers need.

    From a repository with safetensors: these files, configuration, tokenizer and templates, from the top folder. Otherwise, or if the
    reference names a GGUF: this GGUF with all its parts; it contains everything.

    Raises :class:`ArtifactError` if there is no such file, if several match, or if the weights have another format.
    """
    top = [name for name in names if "/" not in name]
    tensors = _safetensors(top)
    if not reference.file and "config.json" in top and (tensors or not weights):
        return NeededFiles([name for name in names if _describes(name)] + (tensors if weights else []))
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() == ".gguf" and not _NO_MODEL.search(path.name):
            groups.setdefault(str(path.with_name(_SPLIT.sub("", path.stem))), []).append(name)
    chosen = [group for group in groups if _means(reference.file, group, groups[group])] if reference.file else list(groups)
    if len(chosen) == 1:
        return NeededFiles(groups[chosen[0]], groups[chosen[0]][0])
    if chosen or (groups and reference.file):
        found = f"it has {_listed([groups[group][0] for group in chosen or groups])}"
        what = f"{reference} means several GGUF files" if chosen else f"{reference.repo} has no GGUF file {reference.file}"
        raise ArtifactError(what, found, f"name one of them: {reference.repo}:FILE.gguf")
    if reference.file:
        raise ArtifactError(f"{reference.repo} has no GGUF file {reference.file}", "it has no GGUF files", f"ask for {reference.repo}")
    pickled = [name for name in top if name.endswith(_PICKLED)]
    if "config.json" in top and pickled:
        why = f"its weights are pickled ({pickled[0]}), and a pickle can run code"
        raise ArtifactError(f"{reference} has no safetensors and no GGUF", why, "take a revision or another repository that has them")
    missing = "no weights in safetensors or GGUF" if "config.json" in top else "no config.json and no GGUF file in its top folder"
    raise ArtifactError(f"{reference} holds no model that can be served", f"it has {missing}", "take another repository")


def _safetensors(top: Sequence[str]) -> list[str]:
    """The weights: the files with the names that transformers writes, without copies in another layout and without adapters; otherwise all
    safetensors."""
    tensors = [name for name in top if name.endswith(".safetensors")]
    usual = [name for name in tensors if re.fullmatch(r"model(-\S+)?\.safetensors", name)]
    shards = [name for name in usual if name != "model.safetensors"]
    # The loader reads the files of the index; a single file next to it is a copy of the model.
    if "model.safetensors.index.json" in top and shards:
        return shards
    return ["model.safetensors"] if "model.safetensors" in usual else usual or tensors


def _describes(name: str) -> bool:
    """Whether it is configuration, a tokenizer's file or a template."""
    path = PurePosixPath(name)
    if path.suffix == ".jinja":
        return str(path.parent) in (".", _TEMPLATES)
    if path.suffix == ".json":
        return "/" not in name and not _OTHER_JSON.fullmatch(name)
    return name in ("merges.txt", "vocab.txt", "tokenizer.model") or (path.suffix == ".tiktoken" and "/" not in name)


def _means(file: str, group: str, members: Sequence[str]) -> bool:
    """Whether ``file`` matches this GGUF (``group``: its path without parts and suffix): a path, a name or a quantization."""
    path, said = PurePosixPath(group), file.lower()
    if said.endswith(".gguf"):
        return file in members or file in [PurePosixPath(name).name for name in members] or said == f"{path.name}.gguf".lower()
    return bool(re.search(rf"(^|[-._]){re.escape(said)}$", path.name.lower())) or path.parent.name.lower() == said


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
