"""Where a job's deployment can be reached: `endpoint.json` in the job's folder, and a pointer to the newest job's beside it.

Owns these files. Holds addresses and public keys, never a secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.files import write_private
from workers.protocol.specs import RouterAddress

FILE = "endpoint.json"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """``state``: ready until the deployment begins to drain. ``url`` and ``rpc`` are empty where its replicas joined standing routers.

    ``start``: which start of the job wrote it; ``key_file``: the key pair of RPC clients on this user's account; ``time``: Unix seconds.
    """

    state: Literal["ready", "draining"]
    deployment: str
    job: int
    start: int
    generation: int
    node: str
    url: str
    rpc: tuple[RouterAddress, ...]
    models: tuple[str, ...]
    key_file: str
    folder: str
    time: float


def pointer(jobs: str, name: str, task: str) -> Path:
    """The file that names the newest ready job of a name, for each task of an array."""
    return Path(jobs, f"{name}-task{task}.json" if task else f"{name}.json")


def write(path: Path, endpoint: Endpoint) -> None:
    """Whole or not at all, mode 0600."""
    write_private(path, msgspec.json.format(msgspec.json.encode(endpoint)) + b"\n")


def read(path: Path) -> Endpoint | None:
    """None where there is none, or none yet that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Endpoint)
    except (OSError, msgspec.DecodeError):
        return None


def reachable(url: str, address: str) -> str:
    """``url`` as other nodes write it: a listener on every address is reached at this node's."""
    scheme, _, rest = url.partition("://")
    host, colon, port = rest.rpartition(":")
    if host not in ("0.0.0.0", "[::]", "::"):
        return url
    return f"{scheme}://{f'[{address}]' if ':' in address else address}{colon}{port}"
