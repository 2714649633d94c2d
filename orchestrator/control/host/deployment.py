"""What ``trireme up`` is: the process that hosts one deployment from its lock file to the proof that nothing is left.

Owns the run folder, the routers, the connection to the controller and the control socket. Never on the token path; when it is killed,
gangs on a Ray that it did not start go on, and the next ``up`` adopts them.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from orchestrator.auth.keyring import KeyRing
from orchestrator.config.deployment_file import DEFAULT_RUN_DIR, Config, environment
from orchestrator.config.router_spec import ModelCard
from orchestrator.control.controller import TICK_S, Controller, Hung
from orchestrator.control.host import deployment_plan, join_file
from orchestrator.control.host.control_socket import (
    ControlClient,
    ControlCommand,
    ControlReply,
    ControlServer,
    DeploymentStatus,
    UpdateCommand,
    UpdateReport,
)
from orchestrator.control.host.external_routers import JoinedRouters
from orchestrator.control.host.host_checks import check_api_keys, check_length, check_port
from orchestrator.control.host.lock import HostLock
from orchestrator.control.host.own_routers import RouterGroup
from orchestrator.control.host.router_poller import RouterSource
from orchestrator.control.host.status_table import HostFacts, describe, describe_standing
from orchestrator.control.host.update import Update
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.local_launcher import LocalLauncher
from orchestrator.control.launch.mpiexec import MpiInstall, find_mpi
from orchestrator.control.launch.supervisor import sweep
from orchestrator.control.reconciler import ReplicaView, RestartPolicy
from orchestrator.files import make_private
from workers.artifacts.convert import Progress, silent
from workers.epoch import started_at
from workers.protocol.errors import ConfigError, EnvironmentFault, NotFound, Rejected, ReplicaLost, TriremeError
from workers.protocol.messages import Capacity

log = logging.getLogger("trireme.deployment")
#: After the grace: time for farewells, kills and their proof, seconds.
_FAREWELL_S = 15.0
#: Exit code of a start that somebody ended, as shells have it for Ctrl-C.
INTERRUPTED = 130


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person who waits wants to read. ``seconds``: how long it took."""

    kind: Literal["model", "ray", "router", "replica", "join", "ready", "update", "warning", "stopping", "stopped"]
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
    def end_with_host(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Deployment:
    """States: STARTING → READY ⇄ DEGRADED → DRAINING. ``run`` is its life; ``stop`` may be called from any thread or signal handler.

    Its routers are its own, or those that ``config.join`` names. ``standing``: routers alone, which others' replicas join. ``beat`` is
    called at each turn of the loop while it serves, several times a second.
    """

    def __init__(
        self, config: Config, *, standing: bool = False, notify: Notify = _quiet, progress: Progress = silent,
        beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.config, self._standing, self._notify, self._progress, self._beat = config, standing, notify, progress, beat
        self._home = config.home
        self._begun = time.time()
        # 0 = run, 1 = drain, 2 = at once. A plain number, because a signal handler may set it in the middle of anything.
        self._stops = 0
        self._was_ready = False
        self._announced: set[tuple[str, int, str]] = set()
        self._controls: _Controls | None = None
        self._routers: RouterSource | None = None
        self._back = deployment_plan.RouterEndpoints(addresses=())
        self._leave_ray: Callable[[], None] | None = None
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
        check_length(self._home)
        lock = HostLock(self._home / "lock", self.config.name)
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
        joined = None
        if self._standing:
            join_file.check(config)
        elif config.join.file:
            joined = JoinedRouters(config)
            joined.reach(self._heed)
            self._notify(Notice(kind="router", subject=joined.name, text="replicas join its routers"))
        if joined is None:
            check_port(config.http)
            self._check_api_keys()
        keys = KeyRing(self._home / "keys")
        mpi = None if self._standing else find_mpi(environment().get("PATH", ""))
        resolve = deployment_plan.resolve_tokenizer if self._standing else deployment_plan.resolve_model
        models = [resolve(model, config.cache, self._go_on) for model in config.models]
        for model in models:
            self._notify(Notice(kind="model", subject=model.config.name, text=str(model.source)))
        if joined is not None:
            joined.check_tokenizers(models)
        self._heed()
        host = self._begin_control(mpi, sum(g.parallel.world * m.config.cpus_per_rank for m in models for g in m.gangs))
        self._heed()
        self._back = joined.back if joined is not None else deployment_plan.own_back(config, keys, host)
        plan = deployment_plan.plan(config, models, keys, self._back)
        self._gangs, self._cards = plan.gangs, deployment_plan.cards(models)
        self._routers = joined or RouterGroup(plan.routers, make_private(self._home / "routers"), env=environment(), keys=keys)
        self._routers.start()
        assert self._controls is not None
        self._controls.apply(plan.gangs)

    def _begin_control(self, mpi: MpiInstall | None, shares: float) -> str:
        """Who launches the gangs; returns where those on other nodes find routers of ours. ``mpi`` None: there will be none."""
        policy = RestartPolicy(start_timeout_s=self.config.start_timeout_s, drain_grace_s=self.config.drain_grace_s)
        if mpi is None:
            self._controls = join_file.NoGangs()
        elif self.config.launcher == "ray":
            return self._join_ray(policy, shares)
        else:
            self._controls = Controller(LocalLauncher(mpi, environment()), policy)
        return ""

    def _heed(self) -> None:
        if self._stops:
            raise _Stopped

    def _go_on(self, phase: str, done: int, total: int) -> None:
        """Progress of what may take long: told, and left where somebody said stop meanwhile."""
        self._heed()
        self._progress(phase, done, total)

    def _join_ray(self, policy: RestartPolicy, shares: float) -> str:
        """Returns the address at which gangs on other nodes reach the routers; empty where there never will be another."""
        from orchestrator.control.launch import ray_cluster
        from orchestrator.control.ray_controller import RemoteController

        begun = time.time()
        make_private(self._home / "keys")
        joined = ray_cluster.join(self.config.ray, self._home, environment(), cpus=self.config.ray.num_cpus or int(shares + 0.999) + 1)
        self._leave_ray = ray_cluster.leave
        self._controls = RemoteController(self.config.name, self._home / "target.json", policy)
        what = "started" if joined.started else "joined"
        text = f"{what}, {len(joined.addresses)} node{'s' if len(joined.addresses) > 1 else ''}"
        self._notify(Notice(kind="ray", subject=joined.here, text=text, seconds=time.time() - begun))
        wait, need = ray_cluster.stop_wait_s(environment()), self.config.drain_grace_s + _FAREWELL_S
        if wait is not None and wait < need:
            text = f"it is killed {wait:g} s after it was told to stop, and draining may take {need:g} s: set RAY_JOB_STOP_WAIT_TIME_S"
            self._notify(Notice(kind="warning", subject="Ray job", text=text))
        return "" if joined.started else joined.here  # a cluster that is one node now may grow

    def _check_api_keys(self) -> None:
        if warning := check_api_keys(self.config):
            self._notify(Notice(kind="warning", subject=f"HTTP on {self.config.http.host}", text=warning))

    def _serve(self) -> None:
        """The host's loop: a tick every 0.2 s until somebody says stop."""
        assert self._controls is not None and self._routers is not None
        while not self._stops:
            self._routers.tick()
            ready = [(view.name, view.epoch) for view in self._controls.views() if view.phase == "ready"]
            self._controls.tick(self._routers.hung(ready))
            self._announce()
            self._follow_update()
            self._beat()
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
        if moved or update.over:
            report = update.report()
            text = f"{report.phase} {report.error}".strip() if update.over else report.doing
            self._notify(Notice(kind="update", subject=self.config.name, text=text, seconds=report.seconds))

    def _judge(self, status: DeploymentStatus) -> bool:
        """Until the first READY: what failed for good is not waited for. Whether to serve with the rest; raises where there is none."""
        assert self._controls is not None
        if self._standing:
            return self._routers is not None and self._routers.ready()
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
                seconds = time.time() - started_at(row.epoch)
                text = f"tp={row.tp} pp={row.pp} ready"
                self._notify(Notice(kind="replica", subject=row.name, text=text, seconds=seconds, capacity=row.capacity))
            elif row.cause and row.state in ("BACKOFF", "FAILED", "PLACING", "QUARANTINED"):
                self._notify(Notice(kind="warning", subject=row.name, text=f"{row.state}: {row.cause}"))
        if begins:
            self._publish(status)
            self._was_ready = True
            self._notify(Notice(kind="ready", subject=status.name, text=status.url, seconds=status.age_s))

    def _publish(self, status: DeploymentStatus) -> None:
        """Tell others how to join our routers, where these can be reached."""
        config = self.config
        if config.back.host and config.rpc.host and not self._back.prefix:
            key = self._back.addresses[0].server_key
            path = join_file.publish(config, self._back.addresses, key, self._cards, status.url)
            self._notify(Notice(kind="join", subject=config.name, text=str(path)))

    def _end(self) -> list[int]:
        """Routers finish first, then gangs drain; what is left is killed. Returns pids that would not die."""
        grace = self.config.drain_grace_s
        if self._controls is not None:
            self._controls.end_with_host()
        if self._routers is not None:
            self._end_routers(grace)
        left: list[int] = []
        try:
            if self._controls is not None:
                self._end_gangs(self._controls, grace)
        finally:
            if self._controls is not None:
                left = sweep(self._gangs)
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

    def status(self) -> DeploymentStatus:
        """The deployment's table, from what the controller and the routers last said."""
        host = HostFacts(
            begun=self._begun,
            stopping=self._stops > 0,
            was_ready=self._was_ready,
            update=self._update.report() if self._update is not None else None,
        )
        if self._standing:
            return describe_standing(self.config, self._routers, host)
        return describe(self.config, self._controls.views() if self._controls is not None else [], self._routers, host)

    def _obey(self, order: ControlCommand) -> ControlReply:
        match order.do:
            case "drain":
                if self._controls is None or not self._controls.drain(order.name):
                    raise NotFound(
                        f"replica {order.name!r} does not run", "no living gang has this name", "trireme status -o wide names them"
                    )
            case "down":
                self.stop(now=order.now)
            case "update":
                return ControlReply(update=self._begin_update(order.update))
        return ControlReply(status=self.status())

    def _begin_update(self, order: UpdateCommand | None) -> UpdateReport:
        """Called in the control socket's thread; the loop takes the update up at its next turn."""
        if order is None:
            raise Rejected("an update needs a configuration")
        if self._standing:
            raise Rejected(f"{self.config.name} has no replicas to update", "it is routers alone", "trireme down, then trireme router")
        state = self.status().state
        if self._controls is None or state not in ("READY", "DEGRADED"):
            raise Rejected(f"{self.config.name} is {state}", "an update goes from one serving configuration to another", "wait")
        if self._update is not None and not self._update.over:
            raise Rejected("an update is under way", self._update.report().doing, "trireme status tells how far it is")
        views, now = self._controls.views(), time.monotonic()
        update = Update(self.config, order, self._gangs, self._cards, views, back=self._back, now=now, progress=silent)
        if not order.dry_run:
            self._update = update
        return update.report()


def up(
    config: Config, *, standing: bool = False, notify: Notify = _quiet, progress: Progress = silent, beat: Callable[[], None] = lambda: None
) -> int:
    """Host a deployment in this process until SIGTERM, SIGINT or ``down``; a second one does not wait. Returns the exit code.

    Must run in the main thread. Raises ConfigError, ArtifactError or EnvironmentFault when it cannot start; then nothing is left running.
    """
    deployment = Deployment(config, standing=standing, notify=notify, progress=progress, beat=beat)
    before = {number: signal.signal(number, lambda *_: deployment.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return deployment.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def connect(name: str, run_dir: str | Path = DEFAULT_RUN_DIR) -> ControlClient:
    """The deployment ``name`` under ``run_dir``; whether it runs shows at the first call."""
    return ControlClient(name, Path(run_dir).expanduser().absolute() / name / "control.sock")
