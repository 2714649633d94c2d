"""Pretended deployments: a control socket that answers `status`, without routers or replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.control.host.control_socket import ControlReply, ControlServer, DeploymentStatus


@contextmanager
def seeming_deployment(run_dir: Path, name: str, url: str = "") -> Iterator[None]:
    """The deployment ``name`` under ``run_dir``, whose HTTP API is said to be at ``url``."""
    status = DeploymentStatus(
        name=name, state="READY", age_s=1.0, pid=1, launcher="local", url=url, models=(), routers={}, rpc=(), run_dir=str(run_dir / name)
    )
    (run_dir / name).mkdir(exist_ok=True)
    server = ControlServer(run_dir / name / "control.sock", lambda command: ControlReply(status=status))
    try:
        yield
    finally:
        server.close()
