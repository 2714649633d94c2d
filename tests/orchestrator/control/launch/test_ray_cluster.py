"""Ray without any Ray: which cluster a deployment of this host would join, and that all which joining raises is one clear error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.config.deployment_file import Config, RayConfig, load
from orchestrator.control.host.deployment import choose_launcher
from orchestrator.control.host.notices import Notice
from orchestrator.control.launch import ray_cluster
from orchestrator.control.launch.ray_cluster import running
from tests.support.ports import free_ports
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


def note(folder: Path, address: str) -> Path:
    """What ``ray start`` leaves in the folder that RAY_TMPDIR names."""
    file = folder / "ray" / "ray_current_cluster"
    file.parent.mkdir(exist_ok=True)
    file.write_text(address)
    return file


def answering(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach ``head`` and nothing else."""

    def reach(address: str) -> None:
        if address != head:
            raise EnvironmentFault(f"Ray at {address} is not reachable")

    monkeypatch.setattr(ray_cluster, "_reach", reach)


def test_an_address_that_is_named_is_the_one(tmp_path: Path) -> None:
    env = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_TMPDIR": str(tmp_path)}
    assert running(RayConfig(address="10.0.0.2:6379"), env) == "10.0.0.2:6379"
    assert running(RayConfig(), env) == "10.0.0.1:6379"
    assert running(RayConfig(), {"RAY_TMPDIR": str(tmp_path)}) == ""


def test_a_ray_that_was_started_here_is_found_while_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering("10.0.0.3:6379", monkeypatch)
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        note(tmp_path, "10.0.0.3:6379\n")
        assert running(RayConfig(), {variable: str(tmp_path)}) == "10.0.0.3:6379"
        note(tmp_path, "10.0.0.4:6379")  # its Ray has ended, the note has not
        assert running(RayConfig(), {variable: str(tmp_path)}) == ""


def test_a_note_whose_ray_has_ended_is_no_cluster(tmp_path: Path) -> None:
    note(tmp_path, f"127.0.0.1:{free_ports(1)}")
    assert running(RayConfig(), {"RAY_TMPDIR": str(tmp_path)}) == ""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_note_of_another_user_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's folder may be written by everybody: whoever leaves a note there would get the deployment's processes."""
    answering("10.0.0.3:6379", monkeypatch)
    file = note(tmp_path, "10.0.0.3:6379")
    os.chown(file, 12345, 12345)
    assert running(RayConfig(), {"RAY_TMPDIR": str(tmp_path)}) == ""
    file.unlink()
    own = tmp_path / "own"
    own.write_text("10.0.0.3:6379")
    os.symlink(own, file)
    os.lchown(file, 12345, 12345)
    assert running(RayConfig(), {"RAY_TMPDIR": str(tmp_path)}) == ""


def config(**more: object) -> Config:
    return load({"models": [{"name": "m"}], **more}).config


@pytest.mark.parametrize(
    ("given", "env", "launcher", "address", "why"),
    [
        ({}, {}, "local", "", "no Ray was started on this host"),
        ({}, {"RAY_ADDRESS": "10.0.0.1:6379"}, "ray", "10.0.0.1:6379", "a cluster is at 10.0.0.1:6379"),
        ({"ray": {"address": "10.0.0.2:6379"}}, {}, "ray", "10.0.0.2:6379", "a cluster is at 10.0.0.2:6379"),
        ({"ray": {"num_cpus": 4}}, {}, "ray", "", "the file describes one"),
        ({"launcher": "local"}, {"RAY_ADDRESS": "10.0.0.1:6379"}, "local", "", None),
        ({"launcher": "ray"}, {}, "ray", "", None),
    ],
)
def test_the_launcher_follows_what_is_there(
    tmp_path: Path, given: dict[str, object], env: dict[str, str], launcher: str, address: str, why: str | None
) -> None:
    said: list[Notice] = []
    found = choose_launcher(config(**given), env | {"RAY_TMPDIR": str(tmp_path)}, said.append)
    assert (found.launcher, found.ray.address) == (launcher, address)
    assert [notice.kind for notice in said] == ([] if why is None else ["settings"])
    assert why is None or why in said[0].text
