"""Fetches a model of a hub: starts the download process, passes its progress on, and ends it when the caller stops.

Owns the messages between the two, JSON lines. Only that process (:mod:`orchestrator.hub.download`) connects to a hub, so a download ends at
once with its caller, and no other process loads the hub's client. That client reads ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` from the environment by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import msgspec

from orchestrator.hub.reference import HubReference
from workers.artifacts.convert import Progress
from workers.protocol.errors import EnvironmentFault, ErrorReport


class FetchOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The order to the process. ``weights``: fetch the weights too; ``verify``: also hash files that were already in the cache."""

    reference: HubReference
    weights: bool = True
    verify: bool = False


class FetchProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    phase: str
    done: int
    total: int


class Fetched(msgspec.Struct, frozen=True, kw_only=True, tag="fetched"):
    """The download is complete. ``path``: the model's folder, or its GGUF file."""

    path: str


class FetchFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    error: ErrorReport


FetchMessage = FetchProgress | Fetched | FetchFailed


def fetch(order: FetchOrder, progress: Progress) -> Path:
    """The folder or GGUF file of a model on a hub, in the hub's cache (``HF_HOME``); only what is missing there is downloaded.

    ``progress`` may raise: the download ends then, and the next one continues at its last byte.

    Raises:
        NotFound, Unauthorized: the hub does not know the model, or refuses it to this user. ArtifactError: it has no weights that can be
        served, or a file arrived with another hash than the hub names. EnvironmentFault: no hub client is installed, no network, or no
        room.
    """
    name = str(order.reference)
    if find_spec("huggingface_hub") is None:
        hint = "pip install 'trireme-llm[hub]', or give the path of a folder or GGUF file"
        raise EnvironmentFault(f"{name} cannot be downloaded", "huggingface_hub is not installed", hint)
    with tempfile.TemporaryFile() as complaints:
        # A separate session: Ctrl-C in a terminal reaches only this process, which ends the other one.
        command = [sys.executable, "-m", "orchestrator.hub"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(order))
            process.stdin.close()
            path = _follow(process.stdout, progress)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if path is None:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").split("\n")
            why = next((line.strip() for line in reversed(lines) if line.strip()), "its process ended and said nothing")
            raise EnvironmentFault(f"{name} cannot be downloaded", why, "pull again, or give the path of a folder or GGUF file")
    return path


def _follow(lines: IO[bytes], progress: Progress) -> Path | None:
    """The path that the process reports at its end; None if it ended without one. Raises the error that it reports."""
    for line in lines:
        match msgspec.json.decode(line, type=FetchMessage):
            case FetchProgress(phase=phase, done=done, total=total):
                progress(phase, done, total)
            case Fetched(path=path):
                return Path(path)
            case FetchFailed(error=error):
                raise error.error()
    return None
