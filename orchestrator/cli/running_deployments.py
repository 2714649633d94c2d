"""The deployments of this user that run on this machine, found by their control sockets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.protocol.errors import NotFound, Rejected

if TYPE_CHECKING:
    from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus

DEFAULT_RUN_DIR = "~/.local/state/trireme"
RunDir = Annotated[str, typer.Option("--run-dir", envvar="TRIREME_RUN_DIR", help="Where deployments keep their state.")]


def find_running(run_dir: str) -> list[DeploymentStatus]:
    """The status of every deployment that answers, sorted by name."""
    from orchestrator.control.host import deployment

    found = []
    for socket in sorted(Path(run_dir).expanduser().glob("*/control.sock")):
        try:
            found.append(deployment.connect(socket.parent.name, run_dir).status())
        except NotFound:
            continue  # the host was killed and left its socket
    return found


def pick(name: str, run_dir: str) -> ControlClient:
    """Connect to the deployment ``name``, or to the only one that runs.

    Raises :class:`NotFound` when none runs, :class:`Rejected` when several run and ``name`` is empty.
    """
    from orchestrator.control.host import deployment

    if name:
        return deployment.connect(name, run_dir)
    names = [status.name for status in find_running(run_dir)]
    if not names:
        raise NotFound("no deployment runs", f"nothing answers under {run_dir}", "trireme up FILE, or trireme serve MODEL")
    if len(names) > 1:
        raise Rejected(f"{len(names)} deployments run", ", ".join(names), "name one")
    return deployment.connect(names[0], run_dir)
