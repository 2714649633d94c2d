"""Joining and starting Ray: what it raises, whatever it is, is one error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.deployment_file import RayConfig
from orchestrator.control.launch import ray_cluster
from workers.protocol.errors import EnvironmentFault

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (Exception(SLOW), SLOW),
        (Exception("\n\nlast lines of dashboard.err"), "last lines of dashboard.err"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("The GCS is not there\nmore"), "The GCS is not there"),
    ],
)
def test_a_ray_that_does_not_start_is_an_environment_fault(
    raised: Exception, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    def init(**_: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    (tmp_path / "keys").mkdir()
    with pytest.raises(EnvironmentFault) as found:
        ray_cluster.join(RayConfig(), tmp_path, {}, cpus=1)
    assert (found.value.what, found.value.why) == ("cannot start Ray", why)
    assert "--launcher local" in found.value.hint and "ray.log" in found.value.hint
