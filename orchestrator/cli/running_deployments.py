"""The deployments of this user that run on this machine, found by their control sockets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.protocol.errors import NotFound, Rejected

if TYPE_CHECKING:
    from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus

#: The hint of a command that takes the deployment as a flag.
NAME_ONE = "name one with --name"
DEFAULT_RUN_DIR = "~/.local/state/trireme"
RunDir = Annotated[str, typer.Option("--run-dir", envvar="TRIREME_RUN_DIR", help="Folder in which deployments keep their state.")]


def find_running(run_dir: str) -> list[DeploymentStatus]:
    """The status of every deployment that answers, sorted by name."""
    from orchestrator.control.host import control_socket

    found = []
    for socket in sorted(Path(run_dir).expanduser().glob("*/control.sock")):
        try:
            found.append(control_socket.connect(socket.parent.name, run_dir).status())
        except NotFound:
            continue  # the host was killed and left its socket
    return found


def pick(name: str, run_dir: str, hint: str = "name one") -> ControlClient:
    """Connect to the deployment ``name``, or to the only one that runs. ``hint``: how to name the deployment in this command.

    Raises :class:`NotFound` when none runs, :class:`Rejected` when several run and ``name`` is empty.
    """
    from orchestrator.control.host import control_socket

    if name:
        return control_socket.connect(name, run_dir)
    found = the_only_one(run_dir, hint)
    if found is None:
        raise NotFound("no deployment runs", f"nothing answers under {run_dir}", "trireme up FILE, or trireme serve MODEL")
    return control_socket.connect(found.name, run_dir)


def the_only_one(run_dir: str, hint: str) -> DeploymentStatus | None:
    """The status of the only running deployment; None if none runs. Raises :class:`Rejected` when several run."""
    found = find_running(run_dir)
    if len(found) > 1:
        raise Rejected(f"{len(found)} deployments run", ", ".join(status.name for status in found), hint)
    return found[0] if found else None
