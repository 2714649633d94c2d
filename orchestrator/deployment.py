"""What ``trireme up`` is: the process that hosts one deployment from its lock file to the proof that nothing is left.

Owns the run folder, the routers, the connection to the controller and the control socket. Never on the token path; when it is killed,
gangs on a Ray that it did not start go on, and the next ``up`` adopts them.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import psutil

from orchestrator.config import DEFAULT_RUN_DIR, Config, environment
from orchestrator.controller import TICK_S, Controller, Hung
from orchestrator.core.reconcile import Policy, ReplicaView
from orchestrator.keys import KeyRing, read_private
from orchestrator.launch import wanted
from orchestrator.launch.child import kill_tagged, tagged
from orchestrator.launch.control import Answer, Control, ControlServer, Order, Status, UpdateOrder, UpdateReport
from orchestrator.launch.gang import GangSpec, make_private
from orchestrator.launch.local import LocalLauncher
from orchestrator.launch.lock import Lock
from orchestrator.launch.mpi import find_mpi
from orchestrator.launch.routers import RouterGroup
from orchestrator.launch.table import describe
from orchestrator.router.auth import parse_api_keys
from orchestrator.spec import ModelCard
from orchestrator.update import Update
from workers.artifacts.convert import Progress, silent
from workers.errors import ConfigError, EnvironmentFault, NotFound, Rejected, ReplicaLost, TriremeError
from workers.wire import Capacity

log = logging.getLogger("trireme.deployment")
_LONGEST_SOCKET_PATH = 100
#: After the grace: time for farewells, kills and their proof, seconds.
_FAREWELL_S = 15.0
#: Exit code of a start that somebody ended, as shells have it for Ctrl-C.
INTERRUPTED = 130


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person who waits wants to read. ``seconds``: how long it took."""

    kind: Literal["model", "ray", "router", "replica", "ready", "update", "warning", "stopping", "stopped"]
    subject: str
    text: str
    seconds: float = 0.0
    capacity: Capacity | None = None


class _Stopped(Exception):
    """Somebody said stop before everything was started."""


Notify = Callable[[Notice], None]


def _quiet(notice: Notice) -> None:
    log.info("%s %s: %s", notice.kind, notice.subject, notice.text)


class _Controls(Protocol):
    """The controller, in this process or in Ray."""

    def apply(self, gangs: list[GangSpec]) -> None: ...
    def drain(self, replica: str) -> bool: ...
    def tick(self, hung: Hung = ()) -> None: ...
    def views(self) -> list[ReplicaView]: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Deployment:
    """States: STARTING → READY ⇄ DEGRADED → DRAINING. ``run`` is its life; ``stop`` may be called from any thread or signal handler."""

    def __init__(self, config: Config, *, notify: Notify = _quiet, progress: Progress = silent) -> None:
        self.config, self._notify, self._progress = config, notify, progress
        self._home = config.home
        self._begun = time.time()
        # 0 = run, 1 = drain, 2 = at once. A plain number, because a signal handler may set it in the middle of anything.
        self._stops = 0
        self._was_ready = False
        self._announced: set[tuple[str, int, str]] = set()
        self._controls: _Controls | None = None
        self._routers: RouterGroup | None = None
        self._leave_ray: Callable[[], None] | None = None
        self._models: dict[str, str] = {}
        self._gangs: list[GangSpec] = []
        self._cards: tuple[ModelCard, ...] = ()
        self._update: Update | None = None

    def stop(self, *, now: bool = False) -> None:
        """Drain and end; a second call, or ``now``, does not wait for what runs."""
        self._stops = 2 if now or self._stops else 1

    def run(self) -> int:
        """Start, serve, stop; returns 0, or INTERRUPTED when it was stopped before it was ever ready.

        Raises what starting raised, after everything that was started is gone.
        """
        make_private(self._home)
        socket_path = self._home / "control.sock"
        if len(str(self._home / "routers" / "router00-back.sock")) > _LONGEST_SOCKET_PATH:
            raise EnvironmentFault(
                f"{self._home} is too long for Unix sockets", "their paths end at 107 bytes", "choose a shorter --run-dir"
            )
        lock = Lock(self._home / "lock", self.config.name)
        control = ControlServer(socket_path, self._obey)
        try:
            try:
                self._start()
                self._serve()
            except _Stopped:
                log.info("stopped before all was started")
            self._notify(Notice(kind="stopping", subject=self.config.name, text="draining" if self._was_ready else "stopping"))
        except BaseException:
            self._stops = 2
            raise
        finally:
            try:
                left = self._end()
            finally:
                control.close()
                lock.release()
        if left:
            raise EnvironmentFault(f"processes of {self.config.name} do not die", f"pids {left}", "look at them with ps")
        self._notify(Notice(kind="stopped", subject=self.config.name, text="nothing is left", seconds=time.time() - self._begun))
        return 0 if self._was_ready else INTERRUPTED

    def _start(self) -> None:
        config = self.config
        self._check_port()
        self._check_api_keys()
        keys = KeyRing(self._home / "keys")
        policy = Policy(start_timeout_s=config.start_timeout_s, drain_grace_s=config.drain_grace_s)
        mpi = find_mpi(environment().get("PATH", ""))
        models = [wanted.resolve_model(model, config.cache, self._go_on) for model in config.models]
        for model in models:
            self._notify(Notice(kind="model", subject=model.config.name, text=str(model.source)))
        self._heed()
        back_host = ""
        if config.launcher == "ray":
            back_host = self._join_ray(
                policy, sum(gang.parallel.world * model.config.cpus_per_rank for model in models for gang in model.gangs)
            )
        else:
            self._controls = Controller(LocalLauncher(mpi, environment()), policy)
        self._heed()
        plan = wanted.plan(config, models, keys, back_host)
        self._gangs, self._cards = plan.gangs, plan.routers[0].models
        self._models = {spec.replica.name: spec.replica.model for spec in plan.gangs}
        folder = make_private(self._home / "routers")
        client, router = keys.pair("client", "local"), keys.pair("router", "all")
        self._routers = RouterGroup(plan.routers, folder, env=environment(), client=client, router=router)
        self._routers.start()
        assert self._controls is not None
        self._controls.apply(plan.gangs)

    def _heed(self) -> None:
        if self._stops:
            raise _Stopped

    def _go_on(self, phase: str, done: int, total: int) -> None:
        """Progress of what may take long: told, and left where somebody said stop meanwhile."""
        self._heed()
        self._progress(phase, done, total)

    def _join_ray(self, policy: Policy, shares: float) -> str:
        """Returns the address at which gangs on other nodes reach the routers; empty when there is no other node."""
        from orchestrator.launch import cluster

        begun = time.time()
        make_private(self._home / "keys")
        joined = cluster.join(self.config.ray, self._home, environment(), cpus=self.config.ray.num_cpus or int(shares + 0.999) + 1)
        self._leave_ray = cluster.leave
        self._controls = cluster.RemoteController(self.config.name, self._home / "target.json", policy)
        what = "started" if joined.started else "joined"
        text = f"{what}, {len(joined.addresses)} node{'s' if len(joined.addresses) > 1 else ''}"
        self._notify(Notice(kind="ray", subject=joined.here, text=text, seconds=time.time() - begun))
        return joined.here if len(joined.addresses) > 1 else ""

    def _check_port(self) -> None:
        http = self.config.http
        family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((http.host, http.port))
            except OSError as error:
                held = [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == http.port and c.pid]
                why = f"pid {held[0]} listens on it" if held else error.strerror or str(error)
                raise EnvironmentFault(
                    f"port {http.port} on {http.host} is taken", why, "choose another --port; 0 = any free one"
                ) from None

    def _check_api_keys(self) -> None:
        """Before anything is fetched; the routers read the file themselves. Raises ConfigError."""
        if (file := self.config.api_keys_file) is not None:
            parse_api_keys(read_private(file))
        elif self.config.http.exposed:
            text = "whoever reaches it can use the models: it has no API keys, by insecure_http_without_keys"
            self._notify(Notice(kind="warning", subject=f"HTTP on {self.config.http.host}", text=text))

    def _serve(self) -> None:
        """The host's loop: a tick every 0.2 s until somebody says stop."""
        assert self._controls is not None and self._routers is not None
        while not self._stops:
            self._routers.tick()
            ready = [(view.name, view.epoch) for view in self._controls.views() if view.phase == "ready"]
            self._controls.tick(self._routers.hung(ready))
            self._announce()
            self._follow_update()
            time.sleep(TICK_S)

    def _follow_update(self) -> None:
        """The next move of an update, when it is time for it."""
        update = self._update
        if update is None or update.over:
            return
        assert self._controls is not None
        try:
            moved = update.step(time.monotonic(), self._controls.views(), self._controls.apply)
        except TriremeError as error:  # a control plane that is down for a while ends nothing that serves
            log.warning("update: %s", error)
            return
        self.config, self._gangs = update.config, update.gangs
        self._models = {spec.replica.name: spec.replica.model for spec in update.gangs}
        if moved or update.over:
            report = update.report()
            text = f"{report.phase} {report.error}".strip() if update.over else report.doing
            self._notify(Notice(kind="update", subject=self.config.name, text=text, seconds=report.seconds))

    def _judge(self, status: Status) -> bool:
        """Until the first READY: what failed for good is not waited for. Whether to serve with the rest; raises where there is none."""
        assert self._controls is not None
        states = [row.state for model in status.models for row in model.rows]
        failed = [view for view in self._controls.views() if view.phase == "failed"]
        if not failed or not set(states) <= {"READY", "FAILED"}:
            return False
        if "READY" not in states:
            first = failed[0]
            kind = {ConfigError.exit_code: ConfigError, EnvironmentFault.exit_code: EnvironmentFault}.get(first.exit_code, ReplicaLost)
            raise kind(f"replica {first.name} cannot start", first.cause, first.hint or f"its logs: {self._home / 'replicas' / first.name}")
        return self._routers is not None and self._routers.ready()

    def _announce(self) -> None:
        status = self.status()
        begins = not self._was_ready and (self._judge(status) or status.state == "READY")
        for row in (row for model in status.models for row in model.rows):
            key = (row.name, row.epoch, row.state)
            if key in self._announced:
                continue
            self._announced.add(key)
            if row.state == "READY":
                seconds = time.time() - (row.epoch >> 16) / 1000
                text = f"tp={row.tp} pp={row.pp} ready"
                self._notify(Notice(kind="replica", subject=row.name, text=text, seconds=seconds, capacity=row.capacity))
            elif row.cause and row.state in ("BACKOFF", "FAILED", "PLACING", "QUARANTINED"):
                self._notify(Notice(kind="warning", subject=row.name, text=f"{row.state}: {row.cause}"))
        if begins:
            self._was_ready = True
            self._notify(Notice(kind="ready", subject=status.name, text=status.url, seconds=status.age_s))

    def _end(self) -> list[int]:
        """Routers finish first, then gangs drain; what is left is killed. Returns pids that would not die."""
        grace = self.config.drain_grace_s
        if self._routers is not None:
            self._end_routers(grace)
        left: list[int] = []
        try:
            if self._controls is not None:
                self._end_gangs(self._controls, grace)
        finally:
            if self._controls is not None:
                left = self._sweep()
            if self._leave_ray is not None:
                self._leave_ray()
        return left

    def _end_gangs(self, controls: _Controls, grace: float) -> None:
        deadline = time.monotonic() + grace + _FAREWELL_S
        controls.apply([])
        controls.tick()
        while controls.views() and time.monotonic() < deadline and self._stops < 2:
            time.sleep(TICK_S / 4)
            controls.tick()
        if controls.views() or self._stops > 1:
            controls.abort()
        controls.close()

    def _end_routers(self, grace: float) -> None:
        assert self._routers is not None
        if self._stops > 1:
            self._routers.stop(0.0)
            return
        done = threading.Event()

        def stop() -> None:
            assert self._routers is not None
            self._routers.stop(grace + 1.0)
            done.set()

        threading.Thread(target=stop, name="router farewell", daemon=True).start()
        while not done.wait(TICK_S):
            if self._stops > 1:
                self._routers.stop(0.0)
                done.wait(_FAREWELL_S)
                return

    def _sweep(self) -> list[int]:
        """Every process on this host that carries the tag of one of our gangs is one too many."""
        left = []
        for spec in self._gangs:
            folder = Path(spec.run_dir, spec.replica.name)
            for epoch in folder.iterdir() if folder.is_dir() else ():
                if epoch.name.isdigit() and tagged(tag := spec.tag(int(epoch.name))):
                    left += kill_tagged(tag)
        return left

    def status(self) -> Status:
        """The deployment's table, from what the controller and the routers last said."""
        return describe(
            self.config,
            self._controls.views() if self._controls is not None else [],
            self._routers,
            models=self._models,
            begun=self._begun,
            stopping=self._stops > 0,
            was_ready=self._was_ready,
            update=self._update.report() if self._update is not None else None,
        )

    def _obey(self, order: Order) -> Answer:
        match order.do:
            case "drain":
                if self._controls is None or not self._controls.drain(order.name):
                    raise NotFound(
                        f"replica {order.name!r} does not run", "no living gang has this name", "trireme status -o wide names them"
                    )
            case "down":
                self.stop(now=order.now)
            case "update":
                return Answer(update=self._begin_update(order.update))
        return Answer(status=self.status())

    def _begin_update(self, order: UpdateOrder | None) -> UpdateReport:
        """Called in the control socket's thread; the loop takes the update up at its next turn."""
        if order is None:
            raise Rejected("an update needs a configuration")
        state = self.status().state
        if self._controls is None or state not in ("READY", "DEGRADED"):
            raise Rejected(f"{self.config.name} is {state}", "an update goes from one serving configuration to another", "wait")
        if self._update is not None and not self._update.over:
            raise Rejected("an update is under way", self._update.report().doing, "trireme status tells how far it is")
        views, now = self._controls.views(), time.monotonic()
        update = Update(self.config, order, self._gangs, self._cards, views, now=now, progress=silent)
        if not order.dry_run:
            self._update = update
        return update.report()


def up(config: Config, *, notify: Notify = _quiet, progress: Progress = silent) -> int:
    """Host a deployment in this process until SIGTERM, SIGINT or ``down``; a second one does not wait. Returns the exit code.

    Must run in the main thread. Raises ConfigError, ArtifactError or EnvironmentFault when it cannot start; then nothing is left running.
    """
    deployment = Deployment(config, notify=notify, progress=progress)
    before = {number: signal.signal(number, lambda *_: deployment.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return deployment.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def connect(name: str, run_dir: str | Path = DEFAULT_RUN_DIR) -> Control:
    """The deployment ``name`` under ``run_dir``; whether it runs shows at the first call."""
    return Control(name, Path(run_dir).expanduser().absolute() / name / "control.sock")
