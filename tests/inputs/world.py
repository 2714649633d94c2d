"""The world that bad input meets: two real router processes and a real gang on FakeEngine, with good clients beside the bad ones.

Owns the processes and ends them. ``open`` listens on ipc and on loopback HTTP without keys; ``keyed`` on CURVE tcp, and over HTTP with API
keys; both serve the model ``m`` by the same gang.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import msgspec

from orchestrator.auth.keyring import ApiKeyRing, KeyRing
from orchestrator.client import Client, ClientKeys
from orchestrator.config.router_spec import AdmissionSpec, HttpSpec
from tests.support.gang import FAKE, Gang, wait_for
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeOptions, RouterAddress

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODEL = "m"
#: Context and vocabulary of the gang; the tables' numbers stand on these.
CONTEXT, VOCAB = 1024, 320
MAX_BODY = 2 << 20
#: Short steps, but a prompt costs what its tokens cost: a hit in the prefix cache can be seen.
QUICK = msgspec.structs.replace(
    FAKE, options=FakeOptions(fake_step_ms=0.2, fake_token_us=20.0), max_seq_len=CONTEXT, max_batch_size=8, max_num_tokens=512
)
#: What a request may take at the keyed router, seconds.
PATIENCE_S = 2.0
PROMPT = [1, 2, 3]


class World:
    """Use as a context manager; everything is up when it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ring = KeyRing(folder / "keys")
        self.ring.allow([("router", "all"), ("replica", "a"), ("replica", "b"), ("client", "local")])
        for name in ("alice", "bob", "carol"):
            self.ring.admit_client(name, [])
        api = ApiKeyRing(folder / "keys" / "api.json")
        self.api_key, self.other_api_key = api.add("alice", []), api.add("bob", ["other"])
        self.open = RouterRun(folder, "open", http=HttpSpec(port=0, max_body_bytes=MAX_BODY))
        self.keyed = RouterRun(
            folder, "keyed", back="tcp://127.0.0.1:*", rpc="tcp://127.0.0.1:*", key_file=str(self.ring.path("router", "all")),
            allowed_file=str(self.ring.allowed_file), salt_file=str(self.ring.salt_file),
            http=HttpSpec(port=0, max_body_bytes=MAX_BODY, api_keys_file=str(api.path)),
            admission=AdmissionSpec(max_queue=2, request_timeout_s=PATIENCE_S),
        )  # fmt: skip
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> World:
        stack = self._stack
        self.ring.pair("router", "all")
        try:
            stack.enter_context(self.open)
            stack.enter_context(self.keyed)
            self.url = self.open.wait_serving().http
            keyed = self.keyed.wait_serving()
            self.keyed_url, self.server_key = keyed.http, self.ring.pair("router", "all").public
            self.back = RouterAddress(endpoint=keyed.back, server_key=self.server_key)
            self.rpc = RouterAddress(endpoint=keyed.rpc, server_key=self.server_key)
            self.gang = stack.enter_context(
                Gang(
                    self.folder, [self.open.spec.back, self.back], name="a", tp=1, engine=QUICK,
                    artifact=self.open.spec.models[0].tokenizer, key_file=str(self.ring.path("replica", "a")),
                )
            )  # fmt: skip
            self.http = stack.enter_context(httpx.Client(base_url=self.url, timeout=30, trust_env=False))
            self.client = stack.enter_context(self.connect("alice"))
            wait_for(lambda: self.http.get("/ready").status_code == 200, what="the gang")
            wait_for(lambda: any(row["state"] == "ready" for row in self.client.status()["replicas"]), what="the gang by CURVE")
        except BaseException:
            stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def keys(self, name: str) -> ClientKeys:
        return msgspec.json.decode(self.ring.path("client", name).read_bytes(), type=ClientKeys)

    def connect(self, name: str) -> Client:
        """An RPC client of the keyed router."""
        return Client([self.rpc], model=MODEL, keys=self.keys(name))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """To the open router; ``body`` as JSON, or ``content`` as it is."""
        if body is not None:
            options["json"] = body
        return self.http.post(path, **options)

    def good_http(self) -> None:
        answer = self.post(TEXT, text(prompt=PROMPT, max_tokens=4, seed=1, temperature=0, ignore_eos=True))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert answer.json()["choices"][0]["text"] == bytes(expected(4)).decode()

    def good_rpc(self) -> None:
        reply = self.client.complete(PROMPT, texts=False, max_tokens=4, seed=1, temperature=0, ignore_eos=True).result()
        assert reply.tokens == expected(4)

    def status(self) -> dict[str, Any]:
        return dict(self.http.get("/status").json())

    def idle(self) -> None:
        """Wait until nothing is queued or runs, here and at the gang."""

        def settled() -> bool:
            status = self.status()
            replica = status["replicas"][0]
            return not (status["running"] or sum(status["queue"].values()) or replica["running"] or replica["waiting"])

        wait_for(settled, what="an idle world")

    def alive(self) -> None:
        """The processes are those of the start, and no core was dumped into their logs."""
        for router in (self.open, self.keyed):
            assert router.process.poll() is None, router.log.read_text()
            assert "Traceback" not in router.log.read_text(), router.log.read_text()
        assert self.gang.mpiexec.poll() is None, self.gang.logs()


def expected(count: int) -> list[int]:
    return expected_tokens(PROMPT, SamplingParams(seed=1, temperature=0.0, max_tokens=count))


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi", "max_tokens": 2, **fields}


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Health:
    """Asks ``/health`` every 20 ms from a thread of its own while the block runs; ``times`` in seconds, one an answer, and ``lates``: by
    how much the thread itself was woken too late, which is the machine's doing and not the router's."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://")
        self.times: list[float] = []
        self.lates: list[float] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def p99(self) -> float:
        """Of the answers, less that of the machine's own delays."""
        assert len(self.times) >= 10 and not self.failures, self.failures
        answers, delays = (sorted(found)[int(len(found) * 0.99)] for found in (self.times, self.lates))
        return max(0.0, answers - delays)

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        asleep = time.monotonic()
        while not self._stop.wait(0.02):
            started = time.monotonic()
            self.lates.append(started - asleep - 0.02)
            try:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.failures.append(f"status {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
            asleep = time.monotonic()
            self.times.append(asleep - started)
        connection.close()


@contextlib.contextmanager
def growth(*pids: int) -> Iterator[list[float]]:
    """Megabytes that the processes have grown by when the block ends, one figure, filled in at its end."""
    before = sum(map(rss_mb, pids))
    found: list[float] = []
    yield found
    found.append(sum(map(rss_mb, pids)) - before)
