"""The Launcher protocol and its structs: the spec of a gang, and the place of its files on a node. Owns no state."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Protocol

import msgspec

from orchestrator.control.reconciler import GangStatus
from orchestrator.files import make_private, write_private
from orchestrator.planner.placement import RankShare
from workers.protocol.specs import ReplicaSpec
from workers.serving.router_io import KeyPair

#: Number of folders of dead epochs that are kept per replica for their logs.
KEPT_EPOCHS = 5


class GangSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One replica to launch. ``run_dir``: folder for gangs on every node; ``replica.epoch`` and ``.run_dir`` are filled in at launch.

    ``key``: the replica's CURVE key pair as JSON, written beside the spec on rank 0's node; empty on ``ipc://``. ``spread``: a different
    node for each stage. ``restarts``, as :class:`LaunchGang` has it, and ``last_epoch``, the largest known of the replica, are filled in at
    launch.
    """

    deployment: str
    replica: ReplicaSpec
    run_dir: str
    share: RankShare = RankShare()
    spread: bool = False
    key: str = ""
    restarts: int = 0
    last_epoch: int = 0
    command: tuple[str, ...] = (sys.executable, "-m", "workers")

    @property
    def revision(self) -> str:
        """A hash of what is launched: gangs of the same revision are equal. Of the key pair only the public key counts; fields that
        describe earlier launches do not count."""
        public = msgspec.json.decode(self.key, type=KeyPair).public if self.key else ""
        same = msgspec.structs.replace(self, key=public, restarts=0, last_epoch=0)
        return hashlib.blake2b(msgspec.json.encode(same), digest_size=8).hexdigest()

    def tag(self, epoch: int) -> str:
        """Name of one gang, the same on all its hosts."""
        return f"{self.deployment}/{self.replica.name}/{epoch}"


class Launcher(Protocol):
    """The launcher protocol. No call waits for a gang; a failed launch appears as a status. ``poll`` also returns gangs of an earlier
    controller."""

    def start(self, spec: GangSpec) -> None: ...

    def poll(self) -> list[GangStatus]: ...

    def drain(self, name: str, epoch: int) -> None:
        """Order the leader to finish its running requests and end."""

    def kill(self, name: str, epoch: int) -> None:
        """End the gang on every node; ``poll`` returns it until no process of it is left."""

    def close(self) -> None:
        """Release resources that do not belong to a gang."""


def last_epoch(spec: GangSpec) -> int:
    """The largest epoch of the replica with a folder on this node; 0 = none."""
    home = Path(spec.run_dir, spec.replica.name)
    return max((int(entry.name) for entry in home.iterdir() if entry.name.isdigit()), default=0) if home.is_dir() else 0


def prepare(spec: GangSpec, epoch: int) -> Path:
    """Write the gang's files on rank 0's node and return their folder: ``spec.json``, ``key.json``; folders of old epochs are removed,
    except the newest ones."""
    home = make_private(Path(spec.run_dir, spec.replica.name))
    for old in sorted((entry for entry in home.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name))[: -KEPT_EPOCHS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    folder = make_private(home / str(epoch))
    key_file = spec.replica.key_file
    if spec.key:
        key_file = str(folder / "key.json")
        write_private(folder / "key.json", spec.key.encode())
    replica = msgspec.structs.replace(spec.replica, epoch=epoch, run_dir=str(folder), key_file=key_file)
    write_private(folder / "spec.json", msgspec.json.encode(replica))
    return folder
