"""Flow control: what a reader that does not read costs the router, the replica and the others."""

from __future__ import annotations

import ast
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.client.sockets import ClientKeys, ClientSockets
from orchestrator.control.host.router_poller import ask
from orchestrator.router.net.curve_auth import ZapHandler
from orchestrator.router.net.router_socket import RouterSocket
from tests.inputs.world import TEXT, rss_mb, text
from tests.support.figures import SLACK, crowd, figure, lines
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.raw_http import head
from tests.support.router_process import RouterRun
from tests.support.source_tree import modules
from workers.engines.fake import expected_tokens
from workers.protocol.engine import PAUSE_S
from workers.protocol.messages import HIGH_WATER, MAX_FRAME, Heartbeat, Hello, SamplingParams
from workers.protocol.specs import FakeOptions, RouterAddress
from workers.protocol.status import EngineStats
from workers.serving.router_io import KeyPair, RouterIo

#: As many tokens as a reader asks for, and choices that run at once.
WANTED, CHOICES = 5000, 64
ENGINE = msgspec.structs.replace(
    FAKE, options=FakeOptions(fake_step_ms=5.0), max_seq_len=2 * WANTED, max_batch_size=CHOICES, max_num_tokens=512, kv_tokens=2**20
)


@contextmanager
def served(engine: Any = ENGINE) -> Iterator[tuple[RouterRun, Gang, str]]:
    with short_folder() as folder, RouterRun(folder, http=True) as router, Gang(folder, [router.spec.back], tp=1, engine=engine) as gang:
        url = router.wait_serving().http
        wait_for(lambda: httpx.get(url + "/ready", trust_env=False).status_code == 200, what="the gang")
        yield router, gang, url


def status(url: str) -> dict[str, Any]:
    return dict(httpx.get(url + "/status", trust_env=False, timeout=30).json())


class Reader:
    """A streaming client that reads at its own pace from a socket with room for 4 KiB."""

    def __init__(self, url: str, prompt: list[int], tokens: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(30)
        address = httpx.URL(url)
        self.socket.connect((address.host, address.port))
        body = json.dumps(text(prompt=prompt, max_tokens=tokens, stream=True, ignore_eos=True)).encode()
        self.socket.sendall(head(TEXT, len(body)) + body)
        self.read = 0

    def sip(self) -> bool:
        """One byte, if one is there. False: the connection is over, whatever of it still waits to be read."""
        poller = select.poll()
        poller.register(self.socket, select.POLLRDHUP)
        if poller.poll(0):
            return False
        try:
            data = self.socket.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        self.read += len(data)
        return bool(data)

    def event_size(self) -> int:
        """Bytes of one of its events, of those that wait to be read."""
        events = self.socket.recv(4096, socket.MSG_PEEK).split(b"\n\n")[1:-1]
        assert events, "no whole event in sight"
        return max(map(len, events)) + 2

    def close(self) -> None:
        self.socket.close()


class Watch:
    """Streams that are read at once, each in a thread: the times between their tokens, in seconds, and how many tokens there were."""

    def __init__(self, url: str, count: int) -> None:
        self._stop = threading.Event()
        self._gaps: list[float] = []
        self.tokens = 0
        self._threads = [threading.Thread(target=self._run, args=(url, index)) for index in range(count)]
        for thread in self._threads:
            thread.start()

    def p99(self) -> float:
        """Of what came since the last call."""
        found, self._gaps = self._gaps, []
        assert len(found) > 100, "too few tokens to tell"
        return sorted(found)[int(len(found) * 0.99)]

    def close(self) -> None:
        """Returns when every stream has had its end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, url: str, index: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            while not self._stop.is_set():
                last = 0.0
                with http.stream("POST", TEXT, json=text(prompt=[7, index], max_tokens=200, stream=True, ignore_eos=True)) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            if last:
                                self._gaps.append(now - last)
                            last = now
                self.tokens += 200


@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.long)], ids=["paused", "cut"])
def test_readers_of_a_byte_a_second(cut: bool) -> None:
    """F16: 50 of them: the buffers that they fill, the release of their K/V, the others' tokens, and in the long run their end."""
    readers: list[Reader] = []
    # Steps as long as a model's: 50 streams at once must not be what the processors of a small machine wait for.
    with served(msgspec.structs.replace(ENGINE, options=FakeOptions(fake_step_ms=12.0))) as (router, _, url):
        watch = Watch(url, 4)
        try:
            wait_for(lambda: watch.tokens >= 4 * 400, what="the others alone")
            alone = watch.p99()
            memory = rss_mb(router.process.pid)
            readers = [Reader(url, [9, index], WANTED) for index in range(50)]
            begun = time.monotonic()
            wait_for(lambda: replica(url)["preemptions_total"] >= 50, what="the end of the readers' K/V")
            given_up = time.monotonic()
            filling, seen = watch.p99(), watch.tokens
            wait_for(
                lambda: watch.tokens >= seen + 4 * 200 and all(reader.sip() for reader in readers), what="the others beside the paused"
            )
            beside = watch.p99()
            grown = rss_mb(router.process.pid) - memory
        finally:
            watch.close()
        try:
            wait_for(lambda: replica(url)["free_blocks"] == replica(url)["num_blocks"], what="all blocks free")
            made = (_generated(url) - watch.tokens) / len(readers) * readers[0].event_size()
            figure("F16 made for a reader and not read", made / 1024, 256, "KiB")
            figure("F16 router memory for 50 readers", max(0.0, grown), 50 * 0.262, "MB")
            figure("F16 K/V released after the first byte, buffers filled meanwhile", given_up - begun, PAUSE_S + 12.0)
            _compare("F16 inter-token p99 of the others while buffers fill", filling, alone)
            _compare("F16 inter-token p99 of the others afterwards", beside, alone)
            if cut:
                _sip_until_cut(readers, stalled=given_up - PAUSE_S)
        finally:
            for reader in readers:
                reader.close()
        wait_for(lambda: not status(url)["running"], what="the end of the readers' choices")
        assert status(url)["counts"]["failed"] == 0


def _compare(what: str, beside: float, alone: float) -> None:
    """Note how many times ``alone`` it is; the seconds beyond it must be more than a busy machine's own hiccups to count."""
    lines.append(f"{what} {beside / alone:.2f} x / 1.5 x")
    assert beside <= SLACK * 1.5 * crowd() * alone + 0.1, lines[-1]


def replica(url: str) -> dict[str, Any]:
    return dict(status(url)["replicas"][0])


def _generated(url: str) -> int:
    """Tokens that the doors were given since the start."""
    for line in httpx.get(url + "/metrics", trust_env=False).text.splitlines():
        if line.startswith("trireme_generation_tokens_total{"):
            return int(float(line.split()[-1]))
    raise AssertionError("no such series")


def _sip_until_cut(readers: list[Reader], stalled: float) -> None:
    living = list(readers)
    while living:
        assert time.monotonic() - stalled < 120, f"{len(living)} readers were not cut"
        time.sleep(1.0)
        living = [reader for reader in living if reader.sip()]
    figure("F16 the last reader is cut after", time.monotonic() - stalled, 31.0)


#: Twenty streams of one client; says when all have begun, and at the end what it got.
CLIENT = """
import sys, msgspec
from orchestrator.client import Client
with Client([sys.argv[1]], model="m") as client:
    calls = [client.complete([index + 1], texts=False, max_tokens=1500, temperature=0, ignore_eos=True) for index in range(20)]
    for call in calls:
        next(call.stream())
    print("begun", flush=True)
    print(msgspec.json.encode([call.result().tokens for call in calls]).decode(), flush=True)
"""


def test_a_stopped_client() -> None:
    """F17: SIGSTOP with 20 streams: what it costs the router, when its choices are dropped, and that it continues where it stopped."""
    with served() as (router, _, url):
        client = subprocess.Popen([sys.executable, "-c", CLIENT, router.spec.rpc], stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout is not None and client.stdout.readline() == "begun\n"
            assert status(url)["running"] == 20
            memory, peak = rss_mb(router.process.pid), 0.0
            os.kill(client.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            while status(url)["running"]:
                assert time.monotonic() - stopped < 30, "choices of a stopped client go on"
                peak = max(peak, rss_mb(router.process.pid) - memory)
                time.sleep(0.02)
            gone = time.monotonic() - stopped
            os.kill(client.pid, signal.SIGCONT)
            answer = msgspec.json.decode(client.communicate(timeout=60)[0], type=list[list[int]])
        finally:
            client.kill()
            client.wait()
        figure("F17 router memory for a stopped client", max(0.0, peak), 20.0, "MB")
        figure("F17 its choices are dropped after heartbeat loss (2 s) and a wait", gone, 4.0)
        for index, tokens in enumerate(answer):
            assert tokens == expected_tokens([index + 1], SamplingParams(temperature=0.0, max_tokens=1500))
        deadline = time.monotonic() + 5.0
        while replica(url)["free_blocks"] < replica(url)["num_blocks"]:  # as of its last heartbeat
            assert time.monotonic() < deadline, "blocks are left"
            time.sleep(0.05)


# --- no queue without an end


class _IdleLeader:
    """A leader's side of the I/O thread, for a replica with nothing to say."""

    def hello(self) -> Hello:
        raise AssertionError("nobody connects")

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(boot="b", step=0, busy_ms=0.0, predicted_ms=0.0, stats=EngineStats())

    def deliver(self, received: float, event: object) -> None: ...

    def backlog(self) -> int:
        return 0

    def on_io_error(self, error: BaseException) -> None: ...


def constructors() -> set[str]:
    """Every function of the project that makes a ZeroMQ socket."""
    found = set()
    for module, path in modules().items():
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            calls = (call for call in ast.walk(function) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute))
            if any(call.func.attr == "socket" and any(map(_is_zmq, call.args)) for call in calls):
                found.add(f"{module}.{function.name}")
    return found


def _is_zmq(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Attribute) and isinstance(argument.value, ast.Name) and argument.value.id == "zmq"


def test_every_socket_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place that makes a socket, made to connect or bind: high-water marks, frame size and linger are finite."""
    kept: dict[str, dict[str, int]] = {}

    def note(socket: zmq.Socket[bytes], endpoint: str) -> None:
        options = {"sndhwm": zmq.SNDHWM, "rcvhwm": zmq.RCVHWM, "maxmsgsize": zmq.MAXMSGSIZE, "linger": zmq.LINGER}
        where = sys._getframe(2)
        while not where.f_globals["__name__"].startswith(("orchestrator", "workers")):
            assert where.f_back is not None
            where = where.f_back
        name = f"{where.f_globals['__name__']}.{where.f_code.co_name} {endpoint.partition('://')[0]}"
        kept[name] = {option: int(socket.get(number)) for option, number in options.items()}

    for method in ("bind", "connect"):
        original = getattr(zmq.Socket, method)

        def noting(self: zmq.Socket[bytes], endpoint: str, original: Any = original) -> Any:
            note(self, endpoint)
            return original(self, endpoint)

        monkeypatch.setattr(zmq.Socket, method, noting)
    _make_each(kept)
    places = {name.split()[0].replace("._bind", ".__init__") for name in kept if not name.endswith("inproc")}
    inproc = {name.split()[0] for name in kept if name.endswith("inproc")}
    assert places | inproc >= constructors(), "a socket that this test does not know"
    for name, options in kept.items():
        assert 0 < options["sndhwm"] <= HIGH_WATER and 0 < options["rcvhwm"] <= HIGH_WATER, (name, options)
        if not name.endswith("inproc"):
            assert options["maxmsgsize"] == MAX_FRAME and options["linger"] >= 0, (name, options)


def _make_each(kept: dict[str, dict[str, int]]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pair = [key.decode() for key in zmq.curve_keypair()]
    keys = KeyPair(public=pair[0], secret=pair[1])
    with short_folder() as folder:
        nobody = RouterAddress(endpoint=f"ipc://{folder}/nobody")
        port = RouterSocket(
            context, f"ipc://{folder}/port", "client", keys=None, acl=CurveAcl({}), on_frame=lambda *_: None, on_malformed=lambda _: None
        )
        secure = RouterSocket(
            context, "tcp://127.0.0.1:*", "client", keys=keys, acl=CurveAcl({}), on_frame=lambda *_: None, on_malformed=lambda _: None
        )
        assert port.endpoint and secure.endpoint
        ZapHandler(context, CurveAcl({}))
        ClientSockets([nobody], ClientKeys(public=keys.public, secret=keys.secret)).close()
        assert ask(context, nobody, keys) is None
        routers = RouterIo(_IdleLeader(), (nobody,), None, boot="b", heartbeat_s=60.0)
        routers.start()
        wait_for(lambda: any(name.startswith("workers.serving.router_io.") for name in kept), what="the leader's socket")
        routers.close("done")
    context.destroy(0)
