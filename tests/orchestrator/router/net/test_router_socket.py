"""The bound sockets: who may bind where, what is reclaimed, and the allowed-keys table."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from orchestrator.auth.curve_acl import CurveAcl, CurveGrant, parse_grants
from orchestrator.router import __main__ as entry
from orchestrator.router.net.router_socket import RouterSocket
from tests.support.gang import short_folder
from tests.support.router_process import RouterRun
from workers.protocol.errors import ConfigError, EnvironmentFault


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(0)


def port(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> RouterSocket:
    return RouterSocket(context, endpoint, "client", keys=None, acl=CurveAcl({}), on_frame=lambda *_: None, on_malformed=lambda _: None)


def test_an_open_folder_and_a_bare_tcp_socket_are_refused(folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        port(context, "tcp://127.0.0.1:*")
    with pytest.raises(ConfigError, match="neither"):
        port(context, "inproc://x")
    with pytest.raises(ConfigError, match="does not exist"):
        port(context, f"ipc://{folder}/none/x")
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="open to others"):
        port(context, f"ipc://{folder}/x")


def test_a_living_router_keeps_its_path_and_a_dead_ones_is_reclaimed(folder: Path) -> None:
    with RouterRun(folder) as first:
        state = first.wait_serving()
        assert (folder / "router0.back").stat().st_mode & 0o077 == 0
        with RouterRun(folder, "second", back=state.back) as second:
            assert second.process.wait(20) == EnvironmentFault.exit_code
            assert f"process {state.pid} listens" in second.log.read_text()
        assert first.process.poll() is None
        first.kill()
        with RouterRun(folder, "third", back=state.back, rpc=state.rpc) as third:
            third.wait_serving()
            assert third.terminate() == 0


def test_grants_are_by_role_and_name() -> None:
    key, other = "a" * 40, "b" * 40
    gate = CurveAcl(parse_grants(msgspec.json.encode({key: CurveGrant(role="replica", name="r0"), other: CurveGrant(role="client")})))
    assert gate.admits(key, "replica") and not gate.admits(key, "client") and not gate.admits("", "replica")
    assert gate.may_be(key, "r0", "m") and not gate.may_be(key, "r1", "m") and not gate.may_be(other, "r0", "m")
    gate.replace({})
    assert not gate.admits(key, "replica")
    for bad in (b"[]", b'{"short": {"role": "client"}}', b'{"' + b"a" * 40 + b'": {"role": "king"}}'):
        with pytest.raises(ConfigError):
            parse_grants(bad)


def test_the_entry_names_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 2
    assert entry.main([str(folder / "none.json")]) == ConfigError.exit_code
    (folder / "bad.json").write_text('{"name": "r"}')
    assert entry.main([str(folder / "bad.json")]) == ConfigError.exit_code
    shown = capsys.readouterr().err
    assert "none.json" in shown and "`back`" in shown and "Traceback" not in shown
    keys = folder / "keys.json"
    keys.write_text("{}")
    keys.chmod(0o644)
    with pytest.raises(ConfigError, match=r"keys\.json is readable by others"):
        entry.read_keys(str(keys))


def test_large_frames_of_one_peer_let_other_callbacks_pass(folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """A turn of the event loop ends at 64 frames or 256 KiB: after a frame of a megabyte others have their turn."""
    count, size = 12, 1 << 20
    turns: list[int] = []
    seen = 0

    def on_frame(peer: bytes, user: str, frame: bytes | memoryview) -> None:
        nonlocal seen
        seen += 1
        turns.append(turn)

    socket = RouterSocket(
        context, f"ipc://{folder}/x", "client", keys=None, acl=CurveAcl({}), on_frame=on_frame, on_malformed=lambda _: None
    )
    client = context.socket(zmq.DEALER)
    client.connect(socket.endpoint)
    for _ in range(count):
        client.send(bytes(size))
    turn = 0

    async def serve() -> None:
        nonlocal turn
        socket.start()
        deadline = asyncio.get_running_loop().time() + 20
        while seen < count and asyncio.get_running_loop().time() < deadline:
            turn += 1
            await asyncio.sleep(0)
        socket.close(0)

    asyncio.run(serve())
    client.close(0)
    assert seen == count
    # The reader's callback and the one that looks again may come in one turn.
    assert max(turns.count(each) for each in turns) <= 2, "many large frames in one turn"
