"""One router process: the HTTP API, the RPC server, and the dispatcher between them and the replicas.

Owns the tasks of the event loop, the signals and the state file. Builds all parts and connects them; decides nothing about requests.

    starting → serving --SIGTERM, SIGINT or STOP--> draining --all done, or grace over--> stopped

The same signal again ends the grace at once. Bounds: ``drain_grace_s`` of the spec while draining.
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
from typing import TYPE_CHECKING

import msgspec
import zmq

from orchestrator.auth.api_keys import ApiKey, ApiKeys, Salting
from orchestrator.auth.curve_acl import CurveAcl, CurveGrant
from orchestrator.config.router_spec import HttpSpec, RouterSpec
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.diagnostics import Diagnostics
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.frontend.text_models import TextModels
from orchestrator.router.http.app import build_app
from orchestrator.router.http.metrics_app import build_scrape_app
from orchestrator.router.http.server import bind, serve
from orchestrator.router.http.tls import TlsFiles
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.key_limits import KeyLimiter, KeyUsage
from orchestrator.router.metrics import Metrics
from orchestrator.router.net.curve_auth import ZapHandler
from orchestrator.router.net.replica_link import ReplicaLink
from orchestrator.router.net.router_socket import RouterSocket
from orchestrator.router.rpc.server import RpcServer
from orchestrator.router.signals import STOP
from orchestrator.router.tenant_caps import TenantCaps
from workers.files import replace_file
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.messages import RouterHeartbeat, ToReplica
from workers.protocol.running_clock import LONGEST_TURN_S, RunningClock
from workers.protocol.status import RouterPhase, RouterState
from workers.serving.router_io import KeyPair

if TYPE_CHECKING:
    from orchestrator.router.tracing import Traces

#: Seconds between checks of deadlines and silent replicas, and between checks of the allowed-keys and API-keys files.
TICK_S, RELOAD_S = 0.1, 1.0

#: The allowed-keys file's content if it changed since the last call, else None.
LoadGrants = Callable[[], Mapping[str, CurveGrant] | None]
#: The same of the API-keys file.
LoadApiKeys = Callable[[], Iterable[ApiKey] | None]

log = logging.getLogger("trireme.router")


class RouterProcess:
    """Binds every socket on construction. Raises ConfigError, and EnvironmentFault for a port or path that is in use.

    ``load_api_keys`` None: the HTTP API is open to all who reach it. ``salt_key``: salts the prefix cache, the same for all routers.
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
        boot = secrets.token_hex(8)
        greeting = RouterHeartbeat(boot=boot, router=spec.name, routers=spec.peers)
        self._acl = CurveAcl(load_grants() or {})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._tls = TlsFiles(spec.http.tls) if spec.http is not None and spec.http.tls is not None else None
        self._listener = bind(spec.http) if spec.http is not None else None
        # The operator set the host explicitly, so the port may be reached from other hosts; it serves counts and names, never a request's
        # text.
        scrape = HttpSpec(host=spec.metrics.host, port=spec.metrics.port, insecure_without_keys=True)
        self._scrape = bind(scrape) if spec.metrics.port else None
        self._zap = ZapHandler(self._context, self._acl)
        models = [card.name for card in spec.models]
        # The clock for time-outs of replicas, requests and clients. A gap counts less than the time by which a heartbeat may be late.
        self._clock = RunningClock(time.monotonic(), min(LONGEST_TURN_S, spec.heartbeat_s))
        core = RouterCore(greeting, models, spec.admission, ReplicaRegistry(spec.replica_timeout_s, spec.hang_floor_s))
        self._limiter = KeyLimiter()
        self._dispatcher = RouterDispatcher(
            core, name=spec.name, send=self._send_to_replica, clock=self._now, limiter=self._limiter
        )  # fmt: skip
        self._link = ReplicaLink(self._context, spec.back, keys=keys, acl=self._acl, greeting=greeting, events=self._dispatcher)
        self._traces = _traces(spec)
        #: The dispatcher as the frontends see it.
        self._traced: Dispatcher = self._traces.around(self._dispatcher, self._now) if self._traces is not None else self._dispatcher
        self._metrics = Metrics(models, self._dispatcher.status, core.stats, self._usage)
        self._preprocessor = Preprocessor(texts, self._traced, spec.admission, Salting(salt_key))
        self._caps = TenantCaps(spec.admission)
        dump_file = Path(spec.state_file).with_name(f"{spec.name}.dump") if spec.state_file else None
        self._rpc = RpcServer(
            boot=boot, dispatcher=self._traced, preprocessor=self._preprocessor, metrics=self._metrics, acl=self._acl, caps=self._caps,
            send=self._send_to_client, clock=self._now, diagnostics=Diagnostics(spec.name, self._dispatcher, dump_file, self._usage),
        )  # fmt: skip
        self._rpc_socket = RouterSocket(
            self._context, spec.rpc, "client", keys=keys, acl=self._acl, on_frame=self._rpc.on_frame, on_malformed=self._rpc.on_malformed
        )
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Returns when everything is closed."""
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()
        received: set[signal.Signals] = set()

        def on_signal(number: signal.Signals) -> None:
            # When a whole tree of processes is ended (a Ray job's stop), each process gets SIGTERM, and the host process also sends STOP to
            # this one: both mean one order to stop. Only the same signal again is a second order.
            (hurry if number in received else stop).set()
            received.add(number)

        for number in (signal.SIGTERM, signal.SIGINT, STOP):
            loop.add_signal_handler(number, on_signal, number)
        self._zap.start()
        self._link.start()
        self._rpc_socket.start()
        ticker = asyncio.create_task(self._tick())
        http = asyncio.create_task(self._serve_http(stop))
        # The metrics port ends last, so that draining is measured too.
        closing = asyncio.Event()
        scrape = asyncio.create_task(self._serve_scrape(closing))
        stopped = asyncio.create_task(stop.wait())
        compiled = asyncio.create_task(self._texts.sandbox.ready())
        try:
            await asyncio.wait((compiled, stopped), return_when=asyncio.FIRST_COMPLETED)
            if compiled.done():
                await compiled
            self._report("serving")
            # A task that ends before the signal has failed, and the router with it.
            await asyncio.wait((ticker, http, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                await (ticker if ticker.done() else http)
            await self._drain(hurry)
        finally:
            closing.set()
            for task in (ticker, http, scrape, stopped, compiled):
                task.cancel()
            await asyncio.gather(ticker, http, scrape, stopped, compiled, return_exceptions=True)
            self._close()

    async def _drain(self, hurry: asyncio.Event) -> None:
        log.info("draining: %d requests are live", self._dispatcher.live)
        self._report("draining")
        self._dispatcher.stop_accepting()
        self._idle.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
        await asyncio.wait(waits, timeout=self._spec.drain_grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._dispatcher.abort()
        # The last messages of the watchers are on their way to the sockets.
        await asyncio.sleep(TICK_S / 2)

    def _close(self) -> None:
        self._rpc.close()
        self._rpc_socket.close()
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
        app = build_app(self._spec, self._traced, self._preprocessor, self._metrics, self._caps, self._api_keys, self._limiter)
        http = self._spec.http or HttpSpec()
        if self._api_keys is None and http.insecure_without_keys:
            log.warning("%s is open to everyone who reaches it: no API keys, by insecure_http_without_keys", self.http)
        grace_s = self._spec.drain_grace_s
        await serve(app, self._listener, stop, tls=self._tls, trusted_proxies=http.trusted_proxies, grace_s=grace_s)

    async def _serve_scrape(self, closing: asyncio.Event) -> None:
        if self._scrape is not None:
            await serve(build_scrape_app(self._metrics), self._scrape, closing, grace_s=1.0)

    async def _tick(self) -> None:
        beat_at = reload_at = 0.0
        while True:
            now = time.monotonic()
            self._clock.turn(now)
            if now >= beat_at:
                beat_at = now + self._spec.heartbeat_s
                self._link.pulse(self._limiter.report(now))
                self._rpc.pulse()
            if now >= reload_at:
                reload_at = now + RELOAD_S
                self._reload()
            self._dispatcher.tick()
            if not self._dispatcher.live and not self._rpc.live:
                self._idle.set()
            pause = min(TICK_S, self._spec.heartbeat_s)
            due = time.monotonic() + pause
            await asyncio.sleep(pause)
            self._metrics.lag.observe(max(0.0, time.monotonic() - due))

    def _now(self) -> float:
        """Seconds in which this process ran."""
        return self._clock.at(time.monotonic())

    def _usage(self) -> list[KeyUsage]:
        return self._limiter.usage(time.monotonic())

    def _reload(self) -> None:
        grants = self._load_grants()
        if grants is not None:
            self._acl.replace(grants)
        if self._api_keys is not None and self._load_api_keys is not None and (rows := self._load_api_keys()) is not None:
            self._api_keys.replace(rows)
        if self._tls is not None:
            self._tls.refresh()

    def _send_to_replica(self, peer: bytes, message: ToReplica) -> bool:
        return self._link.send(peer, message)

    def _send_to_client(self, peer: bytes, frame: bytes) -> bool:
        return self._rpc_socket.send(peer, frame)

    @property
    def http(self) -> str:
        """The URL of the HTTP API; empty without one."""
        if self._listener is None:
            return ""
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def _report(self, phase: RouterPhase) -> None:
        """Write the state file as a whole. Raises :class:`EnvironmentFault` at the start; later a full disk is only a warning."""
        if not self._spec.state_file:
            return
        http = self.http if phase == "serving" else ""
        state = RouterState(
            name=self._spec.name, pid=os.getpid(), phase=phase, http=http, back=self._link.endpoint, rpc=self._rpc_socket.endpoint
        )
        path = Path(self._spec.state_file)
        try:
            replace_file(path, msgspec.json.encode(state), mode=0o644)
        except OSError as error:
            if phase == "serving":
                raise EnvironmentFault(f"cannot write {path}", error.strerror or str(error), "make room or give access there") from None
            log.warning("cannot write %s: %s; phase %s goes unreported", path, error.strerror, phase)


def _traces(spec: RouterSpec) -> Traces | None:
    """None where the spec names no collector. Raises ConfigError where OpenTelemetry is not installed."""
    if not spec.tracing.endpoint:
        return None
    try:
        from orchestrator.router.tracing import Traces
    except ImportError as error:
        raise ConfigError("tracing.endpoint: OpenTelemetry is not installed", str(error), "pip install 'trireme-llm[otel]'") from None
    return Traces(spec.tracing, spec.name)
