"""The controller: what its launches are newer than, and its last will. The loop is the real one, gangs and the host are not."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.control.controller import Controller
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.ray_controller import ControllerActor
from orchestrator.control.reconciler import GangStatus, RestartPolicy
from orchestrator.files import write_private
from tests.support.gang import wait_for
from workers.protocol.specs import FakeSpec, ReplicaSpec


class Gangs:
    """A launcher whose gangs are ready at once and end when they are ordered to."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], GangStatus] = {}
        self.drained: list[str] = []

    def start(self, spec: GangSpec) -> None:
        epoch = spec.last_epoch + 1
        status = GangStatus(name=spec.replica.name, epoch=epoch, revision=spec.revision, phase="ready", since=time.time())
        self.rows[(status.name, epoch)] = status

    def poll(self) -> list[GangStatus]:
        return list(self.rows.values())

    def drain(self, name: str, epoch: int) -> None:
        self.drained.append(name)
        self.rows[(name, epoch)] = msgspec.structs.replace(self.rows[(name, epoch)], phase="stopped")

    def kill(self, name: str, epoch: int) -> None:
        self.rows.pop((name, epoch), None)

    def close(self) -> None: ...


@pytest.fixture
def host() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def spec(run_dir: Path) -> GangSpec:
    replica = ReplicaSpec(name="a", model="m", artifact="", engine=FakeSpec())
    return GangSpec(deployment="d", replica=replica, run_dir=str(run_dir))


def test_a_host_killed_while_it_ends_is_finished_for(tmp_path: Path, host: subprocess.Popen[bytes]) -> None:
    gangs, ended = Gangs(), []
    target = tmp_path / "target.json"
    write_private(target, msgspec.json.encode([spec(tmp_path)]))
    actor = ControllerActor(str(target), msgspec.json.encode(RestartPolicy()), lambda: gangs, lambda: ended.append(list(gangs.rows)))
    wait_for(lambda: b'"ready"' in actor.report([], {}), what="the gang")
    actor.end_with(host.pid)
    assert gangs.rows and not ended, "a host that ends by itself is not helped"
    host.kill()
    host.wait()
    wait_for(lambda: ended, what="the end")
    assert ended == [[]] and gangs.drained == ["a"]
    assert target.read_bytes() == b"[]", "Ray may start the actor again"


def test_a_new_host_takes_over(tmp_path: Path, host: subprocess.Popen[bytes]) -> None:
    """Between the old host's death and the end of its gangs somebody may want gangs again: they stay."""
    gangs, ended = Gangs(), []
    target = tmp_path / "target.json"
    wanted = msgspec.json.encode([spec(tmp_path)])
    write_private(target, wanted)
    gangs.drain = lambda name, epoch: write_private(target, wanted)  # type: ignore[method-assign, assignment]
    actor = ControllerActor(str(target), msgspec.json.encode(RestartPolicy()), lambda: gangs, lambda: ended.append(1))
    wait_for(lambda: b'"ready"' in actor.report([], {}), what="the gang")
    actor.end_with(host.pid)
    host.kill()
    host.wait()
    wait_for(lambda: not any(thread.name == "last will" for thread in threading.enumerate()), what="the end of the will")
    assert gangs.rows and not ended


def test_a_launch_is_newer_than_what_gangs_folders_and_routers_know(tmp_path: Path) -> None:
    gangs = Gangs()
    controller = Controller(gangs, RestartPolicy())
    (tmp_path / "a" / "41").mkdir(parents=True)
    controller.apply([spec(tmp_path)])
    controller.tick()
    assert list(gangs.rows) == [("a", 42)], "a folder of an earlier host"
    for known, expected in (({}, 43), ({"a": 90, "b": 1000}, 91), ({"a": 5}, 92)):
        controller.tick()  # it sees what it launched
        gangs.rows.clear()
        controller.tick((), known)
        assert list(gangs.rows) == [("a", expected)], "it was seen once, though nothing is left of it"


def test_a_clock_that_is_set_back_stretches_no_back_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gangs = Gangs()
    controller = Controller(gangs, RestartPolicy(backoff_s=0.1, stable_s=1000.0))
    controller.apply([spec(tmp_path)])
    for _ in range(2):
        controller.tick()
        for key, status in list(gangs.rows.items()):
            gangs.rows[key] = msgspec.structs.replace(status, phase="failed")
        controller.tick()
        wall = time.time()
        monkeypatch.setattr(time, "time", lambda wall=wall: wall - 3600.0)

    def launched() -> bool:
        controller.tick()
        return bool(gangs.rows)

    wait_for(launched, 5.0, "the next launch")
