"""A whole deployment without Ray: routers, gangs and the host process, as ``trireme up`` runs them, through faults to a clean end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.config.deployment_file import Config, as_tree, load
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, connect
from orchestrator.control.host.deployment import Deployment
from orchestrator.control.host.notices import Notice
from orchestrator.control.launch.subprocesses import alive, tagged
from tests.support.figures import figure
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol.errors import ArtifactError, EnvironmentFault, NotFound

pytestmark = pytest.mark.mpi
BOUND_S = 120.0


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tr", dir="/tmp") as folder:
        tiny_tokenizer(Path(folder) / "tokenizer")
        yield Path(folder)


def config(home: Path, **more: Any) -> Config:
    model = {"name": "fake", "path": str(home / "tokenizer"), "engine": "fake", "tp_size": 2, "replicas": 2}
    model |= {"kv_tokens": 1024, "max_seq_len": 256}
    tree = {"name": "t", "launcher": "local", "run_dir": str(home / "run"), "http": {"port": 0}, "drain_grace_s": 5, "models": [model]}
    return load(tree | more).config


def until(control: ControlClient, condition: Callable[[DeploymentStatus], bool]) -> DeploymentStatus:
    deadline = time.monotonic() + BOUND_S
    while not condition(status := control.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


HOST = """
import sys, msgspec
from orchestrator.config.deployment_file import Config
from orchestrator.control.host.deployment import up
from workers.protocol.errors import TriremeError
try:
    notify = lambda notice: print(msgspec.json.encode(notice).decode(), flush=True)
    sys.exit(up(msgspec.json.decode(sys.argv[1], type=Config), notify=notify))
except TriremeError as error:
    print(error.lines(), file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Host:
    """``trireme up`` in a process of its own, READY when made; its notices up to there."""

    def __init__(self, config: Config) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[4])}
        command = [sys.executable, "-c", HOST, msgspec.json.encode(config).decode()]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
        self.control = connect(config.name, config.run_dir)
        self.notices: list[Notice] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.notices.append(msgspec.json.decode(line, type=Notice))
            if self.notices[-1].kind == "ready":
                return
        raise AssertionError(f"ended with {self.process.wait()}: {self.notices}")

    def close(self) -> None:
        """SIGTERM, where the test did not end it, and the proof that it ended."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(BOUND_S)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture
def start(home: Path) -> Iterator[Callable[[Config], ControlClient]]:
    hosts: list[Host] = []

    def begin(config: Config) -> ControlClient:
        hosts.append(Host(config))
        return hosts[-1].control

    yield begin
    for host in hosts:
        host.close()


@pytest.fixture
def running(home: Path) -> Iterator[tuple[ControlClient, list[Notice]]]:
    host = Host(config(home))
    yield host.control, host.notices
    host.close()


def everything(status: DeploymentStatus) -> list[int]:
    return [status.pid, *status.routers.values(), *(pid for model in status.models for row in model.replicas for _, _, pid in row.pids)]


def test_up_faults_drain_down(running: tuple[ControlClient, list[Notice]]) -> None:
    control, notices = running
    status = control.status()
    assert status.state == "READY" and status.url.startswith("http://127.0.0.1:") and status.rpc[0].endpoint.startswith("ipc://")
    assert [notice.kind for notice in notices].count("replica") == 2 and notices[-1].kind == "ready"
    assert all(notice.capacity is not None for notice in notices if notice.kind == "replica")
    (model,) = status.models
    assert (model.wanted, model.ready, model.tp, model.pp, model.nodes) == (2, 2, (2,), (1,), 1)

    first = model.replicas[0]
    os.kill(first.pids[1][2], signal.SIGKILL)
    lost = (
        until(control, lambda s: s.models[0].replicas[0].cause != "" or s.models[0].replicas[0].epoch != first.epoch).models[0].replicas[0]
    )
    assert f"rank 1 (pid {first.pids[1][2]})" in lost.cause
    healed = until(control, lambda s: s.state == "READY" and s.models[0].replicas[0].epoch > first.epoch)
    assert not any(alive(pid) for _, _, pid in first.pids) and healed.models[0].replicas[1].epoch == model.replicas[1].epoch

    (router,) = healed.routers.values()
    os.kill(router, signal.SIGKILL)
    until(control, lambda s: s.state == "READY" and set(s.routers.values()) != {router})

    second = healed.models[0].replicas[1]
    control.drain(second.name)
    replaced = until(control, lambda s: s.state == "READY" and s.models[0].replicas[1].epoch > second.epoch)
    assert replaced.models[0].replicas[1].restarts == 0
    with pytest.raises(NotFound):
        control.drain("nobody")

    last = control.status()
    control.down()
    assert not any(map(alive, everything(last)))
    for row in last.models[0].replicas:
        assert tagged(f"t/{row.name}/{row.epoch}") == []
    with pytest.raises(NotFound, match="does not run"):
        control.status()


def test_a_second_up_names_the_holder_and_harms_nothing(running: tuple[ControlClient, list[Notice]], home: Path) -> None:
    control, _ = running
    before = control.status()
    begun = time.monotonic()
    with pytest.raises(EnvironmentFault) as caught:
        Deployment(config(home)).run()
    figure("F24 second up -> refused", time.monotonic() - begun, 2.0)
    assert f"pid {before.pid} holds" in caught.value.why and caught.value.exit_code == 4
    assert everything(control.status()) == everything(before)


def test_a_stopped_rank_is_found_by_the_routers_and_replaced(home: Path, start: Callable[[Config], ControlClient]) -> None:
    control = start(config(home, hang_floor_s=1.0, replica_timeout_s=1.0))
    try:
        first = control.status().models[0].replicas[0]
        os.kill(first.pids[0][2], signal.SIGSTOP)
        status = until(control, lambda s: s.state == "READY" and s.models[0].replicas[0].epoch > first.epoch)
        assert "hung" in status.models[0].replicas[0].cause
        assert not any(alive(pid) for _, _, pid in first.pids)
    finally:
        control.down(now=True)


def test_sigkill_of_the_host_leaves_nothing_and_the_next_up_takes_over(home: Path, start: Callable[[Config], ControlClient]) -> None:
    control = start(config(home))
    last = control.status()
    os.kill(last.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while any(map(alive, everything(last))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = start(config(home))
    assert again.status().state == "READY"
    again.down()


def test_a_second_signal_does_not_wait_for_what_hangs(home: Path, start: Callable[[Config], ControlClient]) -> None:
    control = start(config(home, drain_grace_s=60, hang_floor_s=120, replica_timeout_s=120))
    last = control.status()
    os.kill(last.models[0].replicas[0].pids[0][2], signal.SIGSTOP)
    os.kill(last.pid, signal.SIGTERM)
    until(control, lambda s: s.state == "DRAINING")
    os.kill(last.pid, signal.SIGTERM)
    deadline = time.monotonic() + 30.0
    while any(map(alive, everything(last))):
        assert time.monotonic() < deadline, "the second signal waited for the grace"
        time.sleep(0.02)


def test_a_taken_port_names_its_holder(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault) as caught:
            Deployment(config(home, http={"port": port})).run()
    assert str(port) in caught.value.what and f"pid {os.getpid()} listens" in caught.value.why


def test_a_model_that_is_not_there(home: Path) -> None:
    missing = {"name": "m", "path": str(home), "replicas": 1}
    with pytest.raises(ArtifactError, match=str(home)):
        Deployment(config(home, models=[missing])).run()
    with pytest.raises(NotFound):
        connect("t", home / "run").status()


def test_the_control_socket_is_private_and_refuses_nonsense(running: tuple[ControlClient, list[Notice]], home: Path) -> None:
    control, _ = running
    path = home / "run" / "t" / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for line in (b"{\n", b'{"do": "eval"}\n', b'{"do": "status", "x": 1}\n', b"\xff\n"):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10.0)
            raw.connect(str(path))
            raw.sendall(line)
            assert msgspec.json.decode(raw.recv(65536))["code"] == "invalid_request"
    assert control.status().name == "t", "it answers what makes sense"


def test_no_secret_is_on_a_command_line(running: tuple[ControlClient, list[Notice]], home: Path) -> None:
    control, _ = running
    secrets = [msgspec.json.decode(path.read_bytes())["secret"] for path in (home / "run" / "t" / "keys").glob("*-*.json")]
    assert secrets
    for pid in everything(control.status()):
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert not any(secret.encode() in shown for secret in secrets)


def test_ray_that_is_not_there(home: Path) -> None:
    code = (
        "import sys, msgspec\n"
        "from orchestrator.config.deployment_file import load\n"
        "from orchestrator.control.host.deployment import up\n"
        "from workers.protocol.errors import TriremeError\n"
        "try:\n"
        "    up(load(msgspec.json.decode(sys.argv[1])).config)\n"
        "except TriremeError as error:\n"
        "    print(error.lines()); sys.exit(error.exit_code)\n"
    )
    tree = as_tree(config(home, launcher="ray", ray={"address": "127.0.0.1:1"}))
    root = str(Path(__file__).resolve().parents[4])
    done = subprocess.run(
        [sys.executable, "-c", code, msgspec.json.encode(tree).decode()],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 4 and "Ray at 127.0.0.1:1 is not reachable" in done.stdout, done.stderr
