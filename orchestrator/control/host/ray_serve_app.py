"""A deployment as the one replica of a Ray Serve application, for KubeRay's RayService: `import_path:
orchestrator.control.host.ray_serve_app:app`.

Owns one `trireme up` on the head node. Serve starts, watches and ends it, and never carries a request: clients connect to our own routers.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.config.deployment_file import environment, load
from orchestrator.control.host.control_socket import connect
from orchestrator.control.launch.subprocesses import ChildProcess
from workers.protocol.errors import EnvironmentFault, TriremeError

log = logging.getLogger("trireme.serve")
_POLL_S = 0.5
#: Additional time after the grace for last messages, kills and their verification, seconds.
_FAREWELL_S = 30.0


class ServeHost:
    """Constructed when the deployment of ``file`` is READY; raises :class:`EnvironmentFault` with its last output if it ends before."""

    def __init__(self, file: str, ray_address: str) -> None:
        self._config = load(Path(file), env=environment()).config
        self._words: list[str] = []
        argv = [sys.executable, "-m", "trireme", "up", file]
        self._host = ChildProcess(argv, env={**environment(), "RAY_ADDRESS": ray_address}, on_line=self._heard)
        while not self._state():
            self.check_health()
            time.sleep(_POLL_S)

    def _heard(self, line: str) -> None:
        log.info("%s", line)
        self._words = [*self._words[-4:], line]

    def _state(self) -> str:
        """READY or DEGRADED while it serves, else empty."""
        try:
            state = connect(self._config.name, self._config.run_dir).status().state
        except TriremeError:  # not started yet, or its process has ended
            return ""
        return state if state in ("READY", "DEGRADED") else ""

    def check_health(self) -> None:
        """Serve's health check; if it raises, Serve starts another replica."""
        if self._host.returncode is not None:
            raise EnvironmentFault(f"trireme up ended with {self._host.returncode}", " / ".join(self._words))

    def __call__(self, request: object) -> dict[str, str]:
        """The answer on Serve's own port."""
        return {"deployment": self._config.name, "state": self._state()}

    def __del__(self) -> None:
        """Called by Serve at the end: drain."""
        self._host.signal(signal.SIGTERM)
        self._host.wait(self._config.drain_grace_s + _FAREWELL_S)


def app(arguments: dict[str, str]) -> Any:
    """The application that Serve builds from its configuration; ``arguments``: ``file``, the deployment file on the head node."""
    import ray
    from ray import serve

    grace = load(Path(arguments["file"]), env=environment()).config.drain_grace_s + _FAREWELL_S
    deployment = serve.deployment(
        name="trireme",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        graceful_shutdown_timeout_s=grace,
    )(ServeHost)
    return deployment.bind(arguments["file"], ray.get_runtime_context().gcs_address)
