"""Who must not get in, or not as somebody else: over real CURVE sockets, against real routers with a living gang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from orchestrator.auth.curve_acl import CurveAcl, CurveGrant
from orchestrator.auth.keyring import KeyRing
from orchestrator.client import Client
from orchestrator.files import make_private
from orchestrator.router.__main__ import read_keys
from orchestrator.router.net.curve_auth import ZapHandler
from orchestrator.router.net.router_socket import RouterSocket
from tests.inputs.world import MODEL, PROMPT, World, expected
from tests.support.figures import figure
from tests.support.gang import Gang, short_folder, wait_for
from tests.support.impostor import Impostor, dealer
from tests.support.router_process import RouterRun
from workers.__main__ import read_keys as replica_read_keys
from workers.protocol import messages
from workers.protocol.errors import ConfigError, DeadlineExceeded, EnvironmentFault, Unavailable
from workers.protocol.messages import Bye, Query, RouterHeartbeat, Tokens
from workers.protocol.specs import RouterAddress
from workers.serving.router_io import KeyPair

# --- S1: strangers


@pytest.mark.parametrize("case", ["no security", "PLAIN", "an unknown key", "a replica's key", "a wrong server key"])
def test_strangers_are_not_heard(world: World, case: str) -> None:
    malformed = world.client.status()["rpc"]["malformed"]
    pair, replica = zmq.curve_keypair(), world.ring.pair("replica", "a")
    stranger = (pair[0].decode(), pair[1].decode())
    keys: tuple[str, ...] = {
        "no security": (), "PLAIN": (), "an unknown key": (world.server_key, *stranger),
        "a replica's key": (world.server_key, replica.public, replica.secret), "a wrong server key": (pair[0].decode(), *stranger),
    }[case]  # fmt: skip
    options = {"plain_username": b"root", "plain_password": b"root"} if case == "PLAIN" else {}
    with dealer(world.rpc.endpoint, *keys, **options) as socket:
        for _ in range(3):
            socket.send(b"junk, and then a question")
            socket.send(messages.encode(Query(boot="x", stream=1, what="models")))
        assert not socket.poll(700), "a stranger was answered"
    assert world.client.status()["rpc"]["malformed"] == malformed, "a stranger was heard"
    if case in ("an unknown key", "a replica's key"):
        wait_for(lambda: "refused a connection from" in world.keyed.log.read_text(), what="the warning")
    assert replica.secret not in world.keyed.log.read_text()
    world.good_rpc()


@pytest.mark.parametrize("answered", [False, True])
def test_where_nobody_answers_for_keys_nobody_gets_in(answered: bool) -> None:
    """S2: libzmq lets everybody in when its authenticator is gone, unless the socket insists on one."""
    server, client = (KeyPair(*(key.decode() for key in zmq.curve_keypair())) for _ in range(2))
    gate = CurveAcl({client.public: CurveGrant(role="client")})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    heard: list[bytes] = []
    arrived = asyncio.Event()

    def on_frame(peer: bytes, user: str, frame: bytes | memoryview) -> None:
        heard.append(bytes(frame))
        arrived.set()

    try:
        port = RouterSocket(context, "tcp://127.0.0.1:*", "client", keys=server, acl=gate, on_frame=on_frame, on_malformed=lambda _: None)

        async def serve() -> None:
            loop = asyncio.get_running_loop()
            if answered:
                ZapHandler(context, gate).start()
            port.start()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), 20.0 if answered else 1.0)
            loop.remove_reader(port._socket.fileno())

        with dealer(port.endpoint, server.public, client.public, client.secret) as socket:
            socket.send(b"hello")
            asyncio.run(serve())
    finally:
        context.destroy(0)
    assert heard == ([b"hello"] if answered else [])


# --- S3: a key that was taken off the list


def test_a_removed_key_is_out_at_once(world: World) -> None:
    """Its living connection too: who sent a message is asked at each message."""
    carol = world.connect("carol")
    assert carol.complete(PROMPT, texts=False, max_tokens=4, temperature=0, ignore_eos=True).result().tokens == expected(4)
    keys = world.keys("carol")
    began = time.monotonic()
    world.ring.remove_client("carol")
    answered = began
    try:
        while time.monotonic() - answered < 1.0:
            assert time.monotonic() - began < 30, "a removed key is still served"
            if _answers(carol):
                answered = time.monotonic()
    finally:
        carol.close()
    figure("S3 a living connection of a removed key is served until", answered - began, 2.0)
    with Client([world.rpc], model=MODEL, keys=keys, silence_s=0.2) as again:
        assert not _answers(again), "a removed key connected again"
    world.good_rpc()


def _answers(client: Client) -> bool:
    try:
        client.complete([1], texts=False, max_tokens=1, deadline_s=0.4).result()
    except (DeadlineExceeded, Unavailable):
        return False
    return True


# --- S4: what was recorded on the way


class Tap:
    """A TCP relay that keeps what one client sent."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent = b""
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.create_connection(self._target, timeout=10)
            back = threading.Thread(target=self._copy, args=(far, near, False))
            self._threads.append(back)
            back.start()
            self._copy(near, far, True)

    def _copy(self, source: socket.socket, target: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    self.sent += data
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def test_recorded_bytes_open_nothing(world: World) -> None:
    """The bytes of a whole authenticated session, sent again: the handshake fails, and nothing runs a second time."""
    host, port = world.rpc.endpoint.removeprefix("tcp://").rsplit(":", 1)
    tap = Tap((host, int(port)))
    try:
        address = RouterAddress(endpoint=f"tcp://127.0.0.1:{tap.port}", server_key=world.server_key)
        with Client([address], model=MODEL, keys=world.keys("bob")) as client:
            assert client.complete(PROMPT, texts=False, max_tokens=4, temperature=0, ignore_eos=True).result().tokens == expected(4)
    finally:
        tap.close()
    assert len(tap.sent) > 500
    before = world.client.status()
    with socket.create_connection((host, int(port)), timeout=10) as replay:
        replay.sendall(tap.sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := replay.recv(65536):  # the router closes, or its handshake time is up
                received += chunk
    after = world.client.status()
    assert after["counts"]["accepted"] == before["counts"]["accepted"] and after["rpc"]["malformed"] == before["rpc"]["malformed"]
    world.good_rpc()


# --- S6, S7: who may act as a replica


def names(world: World) -> dict[str, str]:
    return {row["name"]: row["state"] for row in world.client.status()["replicas"]}


def test_only_a_replicas_key_speaks_for_a_replica_and_for_its_own_name(world: World) -> None:
    keys = world.keys("bob")
    with dealer(world.back.endpoint, world.server_key, keys.public, keys.secret) as socket:
        Impostor(socket, "client").hello("c")
        assert not socket.poll(700), "a client's key was let in at the back"
    b = world.ring.pair("replica", "b")
    with dealer(world.back.endpoint, world.server_key, b.public, b.secret) as socket:
        impostor = Impostor(socket, "impostor")
        impostor.hello("a", epoch=2**62)
        assert impostor.hear(Bye).reason == "denied"
        impostor.hello("b", model="another")
        assert impostor.hear(Bye).reason == "model"
        # Not greeted, so not believed: tokens for sequences of others are dropped.
        impostor.tell(Tokens(boot="impostor", streams=[1], attempts=[1], firsts=[0], tokens=[[66]]))
    with dealer(world.back.endpoint, world.server_key, b.public, b.secret, routing_id=b"\x01same") as first:
        Impostor(first, "first").hello("b")
        wait_for(lambda: names(world).get("b") == "ready", what="the second replica")
        with dealer(world.back.endpoint, world.server_key, b.public, b.secret, routing_id=b"\x01same") as second:
            thief = Impostor(second, "thief")
            thief.tell(Tokens(boot="first", streams=[1], attempts=[1], firsts=[0], tokens=[[66]]))
            Impostor(first, "first").beat()
            assert names(world)["a"] == "ready" and names(world)["b"] == "ready", "a stolen routing id took a place"
        Impostor(first, "first").tell(Bye(boot="first", reason="done"))
        wait_for(lambda: names(world)["b"] == "lost", what="its end")
    world.good_rpc()


def test_a_stale_epoch_is_told_to_go_and_not_believed(world: World) -> None:
    b = world.ring.pair("replica", "b")
    with (
        dealer(world.back.endpoint, world.server_key, b.public, b.secret) as new_socket,
        dealer(world.back.endpoint, world.server_key, b.public, b.secret) as old_socket,
    ):
        new, old = Impostor(new_socket, "new"), Impostor(old_socket, "old")
        old.hello("b", epoch=10)
        assert old.hear(RouterHeartbeat)
        new.hello("b", epoch=11)
        assert new.hear(RouterHeartbeat)
        assert old.hear(Bye).reason == "stale", "the replaced process was not told"
        before = world.client.status()["counts"]
        old.tell(Tokens(boot="old", streams=[1], attempts=[1], firsts=[0], tokens=[[66]]))
        old.hello("b", epoch=10)
        assert old.hear(Bye).reason == "stale"
        wait_for(lambda: world.client.status()["counts"]["unknown_speakers"] > before["unknown_speakers"], what="the dropped tokens")
        rows = {row["name"]: row["epoch"] for row in world.client.status()["replicas"]}
        assert rows["b"] == 11 and world.client.status()["counts"]["stale_tokens"] == before["stale_tokens"]
        new.tell(Bye(boot="new", reason="done"))
        wait_for(lambda: names(world)["b"] == "lost", what="its end")
    world.good_rpc()


# --- S13, S18: files


BAD_KEYS = {
    "open": (0o644, None), "missing": (None, None), "bad z85": (0o600, {"public": " " * 40, "secret": "planted" * 5 + "planted"[:5]}),
    "short": (0o600, {"public": "x", "secret": "planted"}), "not JSON": (0o600, "planted"), "a list": (0o600, ["planted"]),
}  # fmt: skip


def spoil(path: Path, case: str) -> None:
    mode, content = BAD_KEYS[case]
    if mode is None:
        path.unlink()
        return
    if content is not None:
        path.write_text(content if isinstance(content, str) else msgspec.json.encode(content).decode())
    path.chmod(mode)


@pytest.mark.parametrize("case", sorted(BAD_KEYS))
@pytest.mark.parametrize("reader", [read_keys, replica_read_keys], ids=["router", "replica"])
def test_a_bad_curve_key_is_refused_by_its_files_name(tmp_path: Path, case: str, reader: Callable[[str], object]) -> None:
    ring = KeyRing(tmp_path / "keys")
    path, secret = ring.path("router", "all"), ring.pair("router", "all").secret
    spoil(path, case)
    with pytest.raises(ConfigError) as caught:
        reader(str(path))
    assert str(path) in caught.value.what and "planted" not in caught.value.lines() and secret not in caught.value.lines()


def test_a_router_does_not_start_on_a_bad_curve_key() -> None:
    with short_folder() as folder:
        ring = KeyRing(folder / "keys")
        ring.allow([("router", "all")])
        path = ring.path("router", "all")
        spoil(path, "bad z85")
        with RouterRun(folder, rpc="tcp://127.0.0.1:*", key_file=str(path), allowed_file=str(ring.allowed_file)) as router:
            assert router.process.wait(30) == ConfigError.exit_code
            said = router.log.read_text()
    assert str(path) in said and "planted" not in said and "Traceback" not in said, said


@pytest.mark.mpi
def test_a_replica_does_not_start_on_a_bad_curve_key() -> None:
    with short_folder() as folder:
        ring = KeyRing(folder / "keys")
        ring.allow([("replica", "a")])
        path = ring.path("replica", "a")
        spoil(path, "open")
        router = RouterAddress(endpoint="tcp://127.0.0.1:9", server_key=ring.pair("router", "all").public)
        with Gang(folder, [router], name="a", tp=1, key_file=str(path)) as gang:
            assert gang.wait_exit(30) == ConfigError.exit_code
            said = gang.logs()
    assert str(path) in said and "Traceback" not in said, said


def test_sockets_and_shared_memory_are_their_users_alone(world: World) -> None:
    assert stat.S_IMODE(world.folder.stat().st_mode) == 0o700
    sockets = [path for path in world.folder.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
    assert len(sockets) == 2 and all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in sockets)
    for path in (world.gang.run_dir, world.ring.folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in world.ring.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for segment in _segments(world.gang.pid(0)):
        assert stat.S_IMODE(segment.stat().st_mode) & 0o077 == 0, segment


def _segments(pid: int) -> list[Path]:
    """Files of shared memory that a process has mapped and that still have a name."""
    mapped = {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line}
    return [Path(name) for name in mapped if Path(name).exists()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder that belongs to somebody else")
def test_a_place_that_somebody_else_took_first_is_refused() -> None:
    with short_folder() as folder:
        squat = folder / "squat"
        squat.mkdir(mode=0o777)
        os.chown(squat, 12345, 12345)
        with pytest.raises(EnvironmentFault, match="belongs to another user"):
            make_private(squat)
        with RouterRun(folder, back=f"ipc://{squat}/back") as router:
            assert router.process.wait(30) == ConfigError.exit_code
            assert "open to others" in router.log.read_text()
        assert not list(squat.iterdir())
