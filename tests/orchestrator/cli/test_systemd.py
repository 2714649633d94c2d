"""What a service manager hears, on a real datagram socket: READY and STOPPING once each, a watchdog's beat no more often than it asked."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.console import Console, ConsoleSettings
from orchestrator.cli.hosting import host
from orchestrator.cli.systemd import SystemdNotifier
from orchestrator.config.deployment_file import load
from orchestrator.control.host.notices import Notice
from tests.support.gang import short_folder


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with short_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(folder / "notify"))
        end.settimeout(5)
        yield end


def heard(manager: socket.socket) -> list[str]:
    """What waits in the socket now."""
    messages: list[str] = []
    manager.setblocking(False)
    while True:
        try:
            messages.append(manager.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_states_are_told(manager: socket.socket) -> None:
    told = SystemdNotifier({"NOTIFY_SOCKET": manager.getsockname()})
    told.ready("serving at http://127.0.0.1:8000")
    told.beat()
    told.stopping()
    assert heard(manager) == ["READY=1\nSTATUS=serving at http://127.0.0.1:8000", "STOPPING=1\nSTATUS=draining"]


def test_the_abstract_namespace() -> None:
    name = f"trireme-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0{name}")
        SystemdNotifier({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert heard(end) == ["STOPPING=1\nSTATUS=draining"]


def test_a_watchdog_is_fed_at_half_its_time(manager: socket.socket) -> None:
    env = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
    told = SystemdNotifier(env)
    begun = time.monotonic()
    while (took := time.monotonic() - begun) < 0.5:
        told.beat()
    beats = heard(manager)
    assert set(beats) == {"WATCHDOG=1"} and 2 <= len(beats) <= took / 0.1 + 1


def test_another_process_is_watched_or_nobody(manager: socket.socket) -> None:
    address = {"NOTIFY_SOCKET": manager.getsockname()}
    for env in (address, address | {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, address | {"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "1"}):
        SystemdNotifier(env).beat()
    assert heard(manager) == []


@pytest.mark.parametrize("address", ["", "/nowhere/notify"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    SystemdNotifier({"NOTIFY_SOCKET": address}).ready("x")


def test_the_host_tells_what_becomes_of_it(manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment's own notices, through the host command that a unit starts."""

    def up(config: object, *, notify: object, on_turn: object, **_: object) -> int:
        for kind in ("router", "ready", "stopping", "stopped"):
            notify(Notice(kind=kind, subject="x", text="http://127.0.0.1:1"))  # type: ignore[operator]
        on_turn()  # type: ignore[operator]
        return 0

    monkeypatch.setattr("orchestrator.control.host.deployment.up", up)
    for name, value in {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    config = load({"models": [{"name": "m"}], "run_dir": str(tmp_path)}).config
    config.home.mkdir()
    assert host(Console(ConsoleSettings(quiet=True)), config, lambda: None) == 0
    assert heard(manager) == ["READY=1\nSTATUS=serving at http://127.0.0.1:1", "STOPPING=1\nSTATUS=draining", "WATCHDOG=1"]
