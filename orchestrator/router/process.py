"""One router process: both doors, the dispatcher between them and the replicas, and the process's own life.

Owns the event loop's tasks, signals and the state file. Builds everything and connects it; decides nothing about requests.

    starting → serving --SIGTERM, SIGINT or STOP--> draining --all done, or grace over--> stopped

The same signal again ends the grace at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import zmq

from orchestrator.auth.api_keys import ApiKey, ApiKeys, Salting
from orchestrator.auth.curve_acl import CurveAcl, CurveGrant
from orchestrator.config.router_spec import HttpSpec, RouterSpec
from orchestrator.control.launch.subprocesses import STOP
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.frontend.text_models import TextModels
from orchestrator.router.http.app import build_app
from orchestrator.router.http.metrics_app import build_scrape_app
from orchestrator.router.http.server import bind, serve
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.metrics import Metrics
from orchestrator.router.net.curve_auth import ZapHandler
from orchestrator.router.net.replica_link import ReplicaLink
from orchestrator.router.net.router_socket import RouterSocket
from orchestrator.router.rpc.server import RpcServer
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.messages import Peers
from workers.serving.router_io import KeyPair

if TYPE_CHECKING:
    from orchestrator.router.tracing import Traces

#: Seconds between looks at deadlines and silent replicas, and at the allowed-keys and API-keys files.
TICK_S, RELOAD_S = 0.1, 1.0

#: The allowed-keys file's content if it changed since the last call, else None.
LoadGrants = Callable[[], Mapping[str, CurveGrant] | None]
#: The same of the API-keys file.
LoadApiKeys = Callable[[], Iterable[ApiKey] | None]

log = logging.getLogger("trireme.router")


class RouterStateFile(msgspec.Struct, frozen=True, kw_only=True):
    """What the state file says. ``http``: URL, empty without that door; ``back`` and ``rpc``: endpoints as they were really bound."""

    name: str
    pid: int
    phase: Literal["starting", "serving", "draining", "stopped"]
    http: str
    back: str
    rpc: str


class RouterProcess:
    """Binds every socket on construction. Raises ConfigError and EnvironmentFault (a port or path that is taken).

    ``load_api_keys`` None: the HTTP door is open to all who reach it. ``salt_key``: of the prefix cache, the same for all routers.
    """

    def __init__(
        self,
        spec: RouterSpec,
        texts: TextModels,
        *,
        salt_key: bytes,
        keys: KeyPair | None = None,
        load_grants: LoadGrants = dict,
        load_api_keys: LoadApiKeys | None = None,
    ) -> None:
        self._spec, self._texts, self._load_grants, self._load_api_keys = spec, texts, load_grants, load_api_keys
        self._api_keys = ApiKeys(load_api_keys() or ()) if load_api_keys is not None else None
        self._salting = Salting(salt_key)
        boot = secrets.token_hex(8)
        greeting = Peers(boot=boot, router=spec.name, routers=spec.peers)
        names = {name: card.name for card in spec.models for name in (card.name, *card.aliases)}
        self._gate = CurveAcl(load_grants() or {})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._listener = bind(spec.http) if spec.http is not None else None
        # Whoever opens it beyond this host said so by naming the host; it tells counts and names, never what was asked.
        scrape = HttpSpec(host=spec.metrics.host, port=spec.metrics.port, insecure_without_keys=True)
        self._scrape = bind(scrape) if spec.metrics.port else None
        self._zap = ZapHandler(self._context, self._gate)
        self._link = ReplicaLink(self._context, spec.back, keys=keys, gate=self._gate, greeting=greeting)
        route = RouterCore(greeting, names, spec.admission, ReplicaRegistry(spec.replica_timeout_s, spec.hang_floor_s))
        self._dispatch = RouterDispatcher(route, name=spec.name, send=self._link.send, clock=time.monotonic)
        self._traces = _traces(spec)
        #: What the doors see of it.
        self._front: Dispatcher = self._traces.around(self._dispatch) if self._traces is not None else self._dispatch
        self._metrics = Metrics([card.name for card in spec.models], self._dispatch.status, route.tallies)
        self._door = RpcServer(
            boot=boot, dispatcher=self._front, texts=texts, metrics=self._metrics, admission=spec.admission, gate=self._gate,
            salting=self._salting, send=self._send_to_client, clock=time.monotonic,
        )  # fmt: skip
        door = self._door
        self._rpc = RouterSocket(
            self._context, spec.rpc, "client", keys=keys, gate=self._gate, on_frame=door.on_frame, on_malformed=door.on_malformed
        )
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Returns when everything is closed."""
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()

        told: set[signal.Signals] = set()

        def on_signal(number: signal.Signals) -> None:
            # Who ends a whole tree of processes (a Ray job's stop) tells each of them SIGTERM, and our host, told too, tells us STOP: that
            # is one order. Only the same signal again is a second one.
            (hurry if number in told else stop).set()
            told.add(number)

        for number in (signal.SIGTERM, signal.SIGINT, STOP):
            loop.add_signal_handler(number, on_signal, number)
        self._texts.cells.start()
        self._zap.start(loop)
        self._link.start(loop, self._dispatch)
        self._rpc.start(loop)
        ticker = asyncio.create_task(self._tick())
        http = asyncio.create_task(self._serve_http(stop))
        # It ends last: what drains is still measured.
        closing = asyncio.Event()
        scrape = asyncio.create_task(self._serve_scrape(closing))
        stopped = asyncio.create_task(stop.wait())
        try:
            self._report("serving")
            # A task that ends before the signal has failed, and the router with it.
            await asyncio.wait((ticker, http, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                await (ticker if ticker.done() else http)
            await self._drain(hurry)
        finally:
            closing.set()
            for task in (ticker, http, scrape, stopped):
                task.cancel()
            await asyncio.gather(ticker, http, scrape, stopped, return_exceptions=True)
            self._close()

    async def _drain(self, hurry: asyncio.Event) -> None:
        log.info("draining: %d requests are live", self._dispatch.live)
        self._report("draining")
        self._dispatch.close()
        self._idle.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
        await asyncio.wait(waits, timeout=self._spec.drain_grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._dispatch.abort()
        # One more turn: the watchers' last words are on their way to the sockets.
        await asyncio.sleep(TICK_S / 2)

    def _close(self) -> None:
        self._door.close()
        self._rpc.close()
        self._link.close()
        self._zap.close()
        for listener in (self._listener, self._scrape):
            if listener is not None:
                listener.close()
        self._texts.close()
        self._context.term()
        if self._traces is not None:
            self._traces.close()
        self._report("stopped")

    async def _serve_http(self, stop: asyncio.Event) -> None:
        if self._listener is None:
            await stop.wait()
            return
        app = build_app(self._spec, self._front, self._texts, self._metrics, self._salting, self._api_keys)
        if self._api_keys is None and self._spec.http is not None and self._spec.http.insecure_without_keys:
            log.warning("%s is open to everyone who reaches it: no API keys, by insecure_http_without_keys", self.http)
        await serve(app, self._listener, stop, grace_s=self._spec.drain_grace_s)

    async def _serve_scrape(self, closing: asyncio.Event) -> None:
        if self._scrape is not None:
            await serve(build_scrape_app(self._metrics), self._scrape, closing, grace_s=1.0)

    async def _tick(self) -> None:
        beat_at = reload_at = 0.0
        while True:
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + self._spec.heartbeat_s
                self._link.pulse()
                self._door.pulse()
            if now >= reload_at:
                reload_at = now + RELOAD_S
                self._reload()
            self._dispatch.tick()
            if not self._dispatch.live and not self._door.live:
                self._idle.set()
            pause = min(TICK_S, self._spec.heartbeat_s)
            due = time.monotonic() + pause
            await asyncio.sleep(pause)
            self._metrics.lag.observe(max(0.0, time.monotonic() - due))

    def _reload(self) -> None:
        grants = self._load_grants()
        if grants is not None:
            self._gate.replace(grants)
        if self._api_keys is not None and self._load_api_keys is not None and (rows := self._load_api_keys()) is not None:
            self._api_keys.replace(rows)

    def _send_to_client(self, peer: bytes, frame: bytes) -> bool:
        return self._rpc.send(peer, frame)

    @property
    def http(self) -> str:
        """Where the HTTP door listens, as a URL."""
        if self._listener is None:
            return ""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _report(self, phase: Literal["serving", "draining", "stopped"]) -> None:
        """Write the state file whole or not at all. Raises :class:`EnvironmentFault` at the start; later a full disk is a warning."""
        if not self._spec.state_file:
            return
        http = self.http if phase == "serving" else ""
        state = RouterStateFile(
            name=self._spec.name, pid=os.getpid(), phase=phase, http=http, back=self._link.endpoint, rpc=self._rpc.endpoint
        )
        path = Path(self._spec.state_file)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(msgspec.json.encode(state))
            aside.replace(path)
        except OSError as error:
            if phase == "serving":
                raise EnvironmentFault(f"cannot write {path}", error.strerror or str(error), "make room or give access there") from None
            log.warning("cannot write %s: %s; phase %s goes unreported", path, error.strerror, phase)


def _traces(spec: RouterSpec) -> Traces | None:
    """None where no collector is named. Raises ConfigError where OpenTelemetry is not installed."""
    if not spec.tracing.endpoint:
        return None
    try:
        from orchestrator.router.tracing import Traces
    except ImportError as error:
        raise ConfigError("tracing.endpoint: OpenTelemetry is not installed", str(error), "pip install 'trireme-llm[otel]'") from None
    return Traces(spec.tracing, spec.name)
