"""What Ray Serve holds for a RayService, without Serve: a host that is READY when it is made, watched, and drained at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.host.control_socket import connect
from orchestrator.control.host.ray_serve_app import ServeHost
from orchestrator.control.launch.subprocesses import alive
from tests.support.deployment import write_config
from tests.support.gang import short_folder, wait_for
from workers.protocol.errors import EnvironmentFault, NotFound


@pytest.mark.mpi
def test_a_replica_is_the_host_of_a_deployment() -> None:
    with short_folder() as folder:
        file = write_config(folder, deployment={"drain_grace_s": 5}, replicas=1)
        host = ServeHost(str(file), "unused: the launcher is local")
        control = connect("e2e", folder / "run")
        status = control.status()
        assert host(None) == {"deployment": "e2e", "state": "READY"}
        host.check_health()
        host.__del__()
        wait_for(lambda: not alive(status.pid) and not any(map(alive, status.routers.values())), what="the end of the host")
        # 130: it was ordered to end within a turn of its loop after it was ready.
        with pytest.raises(EnvironmentFault, match=r"ended with (0|130): .*nothing is left"):
            host.check_health()
        with pytest.raises(NotFound):
            control.status()


def test_a_deployment_that_cannot_start_says_why(tmp_path: Path) -> None:
    with short_folder() as folder:
        file = write_config(folder, path=str(tmp_path / "nowhere"))
        with pytest.raises(EnvironmentFault, match=r"ended with 3.*nowhere"):
            ServeHost(str(file), "unused")
