"""Downloads the files of one model from a hub into the hub's own cache; runs in a separate process.

Owns the files ``blobs/HASH.partial`` of the cache, under one lock per repository. Everything else in the cache belongs to
``huggingface_hub``. A file is added to the cache only after its hash was verified; the download of a partial file continues at its last
byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

import msgspec
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from orchestrator.hub.fetch import FetchOrder
from orchestrator.hub.reference import HubReference, needed_files
from workers.artifacts.atomic_folder import MAKE_ROOM, locked
from workers.artifacts.convert import Progress
from workers.protocol.errors import ArtifactError, EnvironmentFault, NotFound, TriremeError, Unauthorized

#: Files that are downloaded at the same time.
PARALLEL = 4
#: Names of the threads that read and check files begin with this.
THREADS = "hub-file"
#: Time between two progress reports, seconds.
TELL_S = 0.2
DOWNLOAD, VERIFY, WAIT = "download", "verify", "wait for another process"
_MAIN = "main"
_TOO_MANY = 429
_CHUNK = 1 << 20
#: Bytes that the hub's client collects before it writes them: an interrupted download loses at most these. The client's default of 10 MB is
#: many seconds on a slow network.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
#: Pattern for values of a hub that become part of a path.
_HEX, _PLAIN = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?"), re.compile(r"[\w-]+")
#: Connections without a new byte after which a download fails, and the pause before the next one, seconds.
_TRIES, _PAUSE_S = 3, 1.0
_AGAIN = "nothing of it was kept: pull again, or from another hub (HF_ENDPOINT)"


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub describes it. ``digest``: its sha256, or its git hash (sha1) if the hub names no sha256."""

    name: str
    size: int
    digest: str


class HubListing(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one commit."""

    commit: str
    files: Mapping[str, HubFile]


def download(order: FetchOrder, progress: Progress) -> Path:
    """Fetch what is missing and return the model's folder or GGUF file. Raises what :func:`orchestrator.hub.fetch.fetch` names."""
    reference = order.reference
    with _explained(reference):
        try:
            listing = _listing(reference)
        except (OfflineModeIsEnabled, HTTPError, OSError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500 and error.response.status_code != _TOO_MANY:
                raise
            # The hub is unreachable: use a complete earlier download.
            cached = _cached(order)
            if cached is None:
                raise
            return cached
        needed = needed_files(reference, list(listing.files), weights=order.weights)
        repository = _Repository(reference, listing.commit)
        files = [listing.files[name] for name in needed.names]
        if order.verify:
            repository.verify([file for file in files if repository.pointer(file).exists()], progress)
        # A complete cache may be read-only, so it is not locked.
        if not all(repository.pointer(file).exists() for file in files):
            lock = Path(constants.HF_HUB_CACHE) / ".locks" / _folder(reference).name / "trireme.lock"
            with locked(lock, on_wait=lambda: progress(WAIT, 0, 0)):
                repository.fetch([file for file in files if not repository.pointer(file).exists()], progress)
        with suppress(OSError):
            _name_commit(reference, listing.commit)
        return repository.snapshot / needed.model


def _listing(reference: HubReference) -> HubListing:
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(reference.repo, revision=reference.revision or None, files_metadata=True, timeout=timeout)
    files = {}
    for each in info.siblings or ():
        digest = (each.lfs.sha256 if each.lfs else each.blob_id) or ""
        path = PurePosixPath(each.rfilename)
        if _HEX.fullmatch(digest) and not path.is_absolute() and ".." not in path.parts:
            files[each.rfilename] = HubFile(name=each.rfilename, size=each.size or 0, digest=digest)
    if not _HEX.fullmatch(info.sha or "") or (info.siblings and not files):
        hint = "check HF_ENDPOINT: it is no hub, or an old mirror of one"
        raise EnvironmentFault(f"{reference} cannot be downloaded", f"{constants.ENDPOINT} names no commit or no hashes of files", hint)
    return HubListing(commit=info.sha, files=files)


def _folder(reference: HubReference) -> Path:
    """The repository's folder in the hub's cache."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=reference.repo, repo_type="model"))


def _name_commit(reference: HubReference, commit: str) -> None:
    """Record the commit of the revision, in the file that the hub's client reads without a network."""
    revision = reference.revision or _MAIN
    path = _folder(reference) / "refs" / revision
    if revision != commit and not (path.is_file() and path.read_text() == commit):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


def _cached(order: FetchOrder) -> Path | None:
    """The model in the cache; None unless it is complete."""
    reference, folder = order.reference, _folder(order.reference)
    revision = reference.revision or _MAIN
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    try:
        needed = needed_files(reference, names, weights=order.weights)
    except ArtifactError:
        return None
    whole = not order.weights or _whole(snapshot, needed.names)
    return snapshot / needed.model if whole else None


def _whole(snapshot: Path, names: list[str]) -> bool:
    """Whether no part of the weights is missing: an index lists its files, and the name of a part (``-00001-of-00004``) contains the number
    of parts."""
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        return set(msgspec.json.decode(index.read_bytes())["weight_map"].values()) <= set(names)
    parts = [name for name in names if "-of-" in name]
    return not parts or len(parts) == int(Path(parts[0]).stem.rpartition("-of-")[2])


class _Repository:
    """One commit of a repository: the source and the target of its files."""

    def __init__(self, reference: HubReference, commit: str) -> None:
        self.repo, self.commit = reference.repo, commit
        self.folder = _folder(reference)
        self.snapshot = self.folder / "snapshots" / commit

    def pointer(self, file: HubFile) -> Path:
        return self.snapshot / file.name

    def verify(self, files: list[HubFile], progress: Progress) -> None:
        """Hash existing files. Raises :class:`ArtifactError` for another hash than the hub names."""
        meter = _Meter()
        _each(files, lambda file: self._check(file, self.pointer(file), partial(meter.add, file)), VERIFY, progress, meter)

    def fetch(self, files: list[HubFile], progress: Progress) -> None:
        """Download files, continuing earlier downloads. Raises :class:`ArtifactError` for another hash than the hub names."""
        meter = _Meter()
        # Files of equal content are one blob: the first of them is fetched, and the others are links to it.
        blobs = {file.digest: file for file in reversed(files)}
        _each(list(blobs.values()), lambda file: self._fetch(file, meter.bar(file)), DOWNLOAD, progress, meter)
        for file in files:
            if file is not blobs[file.digest]:
                hf_hub_download(self.repo, file.name, revision=self.commit)

    def _fetch(self, file: HubFile, bar: type[tqdm]) -> None:
        url, headers = hf_hub_url(self.repo, file.name, revision=self.commit), build_hf_headers()
        facts = get_hf_file_metadata(url, headers=headers)
        if urlsplit(facts.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token must reach the hub only, not the storage server to which it redirects
        blobs = self.folder / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        unfinished = blobs / f"{file.digest}.partial"
        with unfinished.open("ab") as target:
            if target.tell() > file.size:
                target.seek(0)
                target.truncate()
            _get(facts.location, target, headers, file.size, bar)
            target.flush()
            os.fsync(target.fileno())
        self._check(file, unfinished)
        # The client names a blob by its ETag. When it finds the blob it only links it into the snapshot.
        unfinished.replace(blobs / (facts.etag if _PLAIN.fullmatch(facts.etag or "") else file.digest))
        hf_hub_download(self.repo, file.name, revision=self.commit)

    def _check(self, file: HubFile, path: Path, count: Callable[[int], None] = lambda size: None) -> None:
        """Compare ``path`` with the hub's size and hash of ``file``; a wrong file is deleted. Raises :class:`ArtifactError`."""
        got = _digest(path, file, count)
        if got != file.digest:
            kind = "sha256" if len(file.digest) == 64 else "git hash"
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            why = f"expected {kind} {file.digest} ({file.size} bytes), got {got}"
            raise ArtifactError(f"{self.repo}: {file.name} is not what it should be", why, _AGAIN)


def _get(url: str, target: IO[bytes], headers: dict[str, str], size: int, bar: type[tqdm]) -> None:
    """Append the rest of a file of ``size`` bytes. A broken connection is opened again, as long as each connection delivers some bytes."""
    tries = _TRIES
    while True:
        begin = target.tell()
        try:
            http_get(url, target, resume_size=begin, headers=headers, expected_size=size or None, tqdm_class=bar)
        except HfHubHTTPError:
            raise
        except HTTPError:
            tries = tries - 1 if target.tell() == begin else _TRIES
            if not tries:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def _digest(path: Path, file: HubFile, count: Callable[[int], None]) -> str:
    """The hash of ``path``, of the kind that the hub names for ``file``. ``count`` is called with the number of bytes read."""
    if len(file.digest) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
            count(len(chunk))
    return digest.hexdigest()


class _Meter:
    """Counts the bytes of several files, each of which has its own thread."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    @property
    def done(self) -> int:
        return sum(list(self._done.values()))

    def add(self, file: HubFile, count: int) -> None:
        self._done[file.name] = self._done.get(file.name, 0) + count

    def bar(self, file: HubFile) -> type[tqdm]:
        """A progress-bar class for the hub's client that draws nothing and only counts; each connection has one bar."""
        done = self._done

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *_: object, initial: int = 0, total: int | None = None, **__: object) -> None:
                super().__init__(total=total, disable=True)
                done[file.name] = initial

            def update(self, n: float | None = 1) -> None:
                done[file.name] += int(n or 0)

        return Bar


def _each(files: list[HubFile], work: Callable[[HubFile], None], phase: str, progress: Progress, meter: _Meter) -> None:
    """Run ``work`` for all files, some at a time, and report progress. Raises the first error; then no further file is started, and threads
    that still run (named :data:`THREADS`) are not joined, because the process ends."""
    total = sum(file.size for file in files)
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix=THREADS)
    try:
        pending = {pool.submit(work, file) for file in files}
        while pending:
            ended, pending = wait(pending, TELL_S, FIRST_COMPLETED)
            for future in ended:
                future.result()
            progress(phase, min(meter.done, total) if pending else total, total)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _explained(reference: HubReference) -> Iterator[None]:
    """Converts exceptions of the hub's client to the project's errors: what happened, why, what to do."""
    hub, repo = constants.ENDPOINT, reference.repo
    try:
        yield
    except TriremeError:
        raise
    except GatedRepoError as error:
        why = "this token's account has not been given access" if get_token() else "it is given only to known accounts, and no token is set"
        hint = f"accept its terms at {hub}/{repo}, then set HF_TOKEN or run `hf auth login`"
        raise Unauthorized(f"{repo} is gated", why, hint) from error
    except RepositoryNotFoundError as error:
        why = f"no file or folder is there, and {hub} knows no such model or does not show it to this account"
        raise NotFound(
            f"there is no model at {repo}", why, "check the name; for a private model set HF_TOKEN or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(
            f"{repo} has no revision {reference.revision}", f"{hub} knows none of this name", "give a branch, a tag or a commit"
        ) from error
    except HFValidationError as error:
        raise NotFound(f"there is no model at {repo}", str(error).splitlines()[0], "a hub id is ORG/NAME") from error
    except OfflineModeIsEnabled as error:
        why = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold it whole"
        raise EnvironmentFault(f"{reference} cannot be downloaded", why, "pull it once with a network, or unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise Unauthorized(f"{hub} refuses {repo}", _first_line(error), "check HF_TOKEN, or run `hf auth login`") from error
        hint = "wait, or set HF_TOKEN for a higher limit" if status == 429 else "try again later; what has come is kept"
        raise EnvironmentFault(f"{reference} cannot be downloaded", _first_line(error), hint) from error
    except HTTPError as error:
        why = f"{hub}: {_first_line(error) or type(error).__name__}"
        raise EnvironmentFault(
            f"{reference} cannot be downloaded", why, "check the network, proxy and HF_ENDPOINT; what has come is kept"
        ) from error
    except OSError as error:
        hint = MAKE_ROOM if error.errno in (ENOSPC, EDQUOT, EACCES, EPERM, EROFS) else "pull again; what has come is kept"
        raise EnvironmentFault(f"{reference} cannot be downloaded", error.strerror or _first_line(error), hint) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
