"""``trireme up``: the process that hosts one deployment, from its lock file to the check that no process of it is left.

Owns the run folder, the control socket, and the order in which routers, replicas and updates begin and end. Never on the token path; when
it is killed, gangs on a Ray that it did not start continue, and the next ``up`` adopts them.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from orchestrator.auth.keyring import KeyRing
from orchestrator.config.deployment_file import Config, RayConfig, environment
from orchestrator.config.engine_settings import AUTO
from orchestrator.control.controller import LONGEST_ROUND_S, TICK_S
from orchestrator.control.host import deployment_plan, join_file
from orchestrator.control.host.control_socket import (
    ControlCommand,
    ControlReply,
    ControlServer,
    DeploymentStatus,
    UpdateCommand,
    UpdateReport,
)
from orchestrator.control.host.desired_state import DesiredState
from orchestrator.control.host.external_routers import ExternalRouters
from orchestrator.control.host.host_checks import check_api_keys, check_port, check_socket_path
from orchestrator.control.host.lock import HostLock
from orchestrator.control.host.notices import Notice, Notify, ReplicaNotices, log_notice
from orchestrator.control.host.own_routers import OwnRouters
from orchestrator.control.host.replica_source import FAREWELL_S, ExternalReplicas, OwnReplicas, ReplicaSource
from orchestrator.control.host.router_poller import newest_epochs
from orchestrator.control.host.router_source import RouterSource
from orchestrator.control.host.status_table import HostFacts
from orchestrator.control.launch import ray_cluster
from orchestrator.files import make_private
from workers.artifacts.convert import Progress, silent
from workers.protocol.errors import EnvironmentFault, NotFound, Rejected, TriremeError
from workers.protocol.running_clock import RunningClock

log = logging.getLogger("trireme.deployment")
#: Exit code of an interrupted start, the one that shells use for Ctrl-C.
INTERRUPTED = 130


class _Stopped(Exception):
    """The deployment was stopped before everything was started."""


class Deployment:
    """States: STARTING → READY ⇄ DEGRADED → DRAINING. FAILED: it has served, and every replica has failed permanently since; its routers
    run without a replica until :meth:`stop`.

    ``run`` starts it, serves and ends it; ``stop`` may be called from any thread or signal handler.

    ``replicas``: source of the replicas; None = this deployment's own controller. The routers are its own, or those that ``config.join``
    names. ``on_turn`` is called in each turn of the loop while it serves, several times a second.
    """

    def __init__(
        self, config: Config, *, replicas: ReplicaSource | None = None, notify: Notify = log_notice, progress: Progress = silent,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if replicas is None:
            config = choose_launcher(config, environment(), notify)
        self._config, self._notify, self._progress, self._on_turn = config, notify, progress, on_turn
        self._run_folder = config.home
        self._started_at = time.time()
        # 0 = run, 1 = drain, 2 = at once. A plain number, because a signal handler may set it in the middle of anything.
        self._stops = 0
        #: Clock for the time-outs of an update's moves.
        self._clock = RunningClock(time.monotonic(), LONGEST_ROUND_S)
        self._was_ready = False
        self._replicas: ReplicaSource = OwnReplicas(config, notify) if replicas is None else replicas
        self._replica_notices = ReplicaNotices(notify)
        self._routers: RouterSource | None = None
        self._desired: DesiredState | None = None

    @property
    def config(self) -> Config:
        """The configuration in force, which an update may replace."""
        return self._config if self._desired is None else self._desired.config

    def stop(self, *, now: bool = False) -> None:
        """Drain and end; a second call, or ``now``, does not wait for running requests."""
        self._stops = 2 if now or self._stops else 1

    def run(self) -> int:
        """Start, serve, stop; returns 0, or INTERRUPTED if it was stopped before it was ever ready.

        Raises the error of a failed start, after everything that was started has ended.
        """
        make_private(self._run_folder)
        socket_path = self._run_folder / "control.sock"
        check_socket_path(self._run_folder)
        lock = HostLock(self._run_folder, self.config.name)
        control = ControlServer(socket_path, self._handle_command)
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
        self._notify(Notice(kind="stopped", subject=self.config.name, text="nothing is left", seconds=time.time() - self._started_at))
        return 0 if self._was_ready else INTERRUPTED

    def _start(self) -> None:
        config = self._config
        self._replicas.check()
        external = self._reach_external_routers() if config.join.file else None
        if external is None:
            check_port(config.http)
            self._check_api_keys()
        keys = KeyRing(self._run_folder / "keys")
        models = self._replicas.resolve(config.models, self._follow_progress)
        for model in models:
            self._notify(Notice(kind="model", subject=model.config.name, text=str(model.source)))
        if external is not None:
            external.check_tokenizers(models)
        self._check_stop()
        reachable_at = self._replicas.start(models)
        self._check_stop()
        endpoints = external.endpoints if external is not None else deployment_plan.own_endpoints(config, keys, reachable_at)
        plan = deployment_plan.plan(config, models, keys, endpoints)
        cards = deployment_plan.model_cards(models)
        self._desired = DesiredState(config, plan.gangs, cards, endpoints, keys, self._replicas.hardware)
        self._routers = external or OwnRouters(plan.routers, make_private(self._run_folder / "routers"), env=environment(), keys=keys)
        self._routers.start()
        self._replicas.apply(plan.gangs)

    def _reach_external_routers(self) -> ExternalRouters:
        external = ExternalRouters(self._config)
        external.reach(self._check_stop)
        self._notify(Notice(kind="router", subject=external.name, text="replicas join its routers"))
        return external

    def _check_stop(self) -> None:
        """Raises :class:`_Stopped` if :meth:`stop` was called meanwhile."""
        if self._stops:
            raise _Stopped

    def _follow_progress(self, phase: str, done: int, total: int) -> None:
        """Show the progress of a long operation. Raises :class:`_Stopped` to end it if :meth:`stop` was called meanwhile."""
        self._check_stop()
        self._progress(phase, done, total)

    def _check_api_keys(self) -> None:
        if warning := check_api_keys(self.config):
            self._notify(Notice(kind="warning", subject=f"HTTP on {self.config.http.host}", text=warning))

    def _serve(self) -> None:
        """The host's loop: a tick every 0.2 s until :meth:`stop`."""
        assert self._routers is not None
        while not self._stops:
            self._clock.turn(time.monotonic())
            self._routers.tick()
            ready = [(view.name, view.epoch) for view in self._replicas.views() if view.phase == "ready"]
            self._replicas.tick(self._routers.hung(ready), newest_epochs(self._routers.reports()))
            self._announce(self._routers)
            self._follow_update()
            self._on_turn()
            time.sleep(TICK_S)

    def _follow_update(self) -> None:
        """Make the next move of an update, if it is due."""
        assert self._desired is not None
        try:
            report = self._desired.step(self._clock.at(time.monotonic()), self._replicas.views(), self._replicas.apply)
        except TriremeError as error:  # a control plane that is down for a while must not end what serves
            log.warning("update: %s", error)
            return
        if report is not None:
            text = report.doing or f"{report.phase} {report.error}".strip()
            self._notify(Notice(kind="update", subject=self.config.name, text=text, seconds=report.seconds))

    def _announce(self, routers: RouterSource) -> None:
        """Send a notice of every change, and one notice that the deployment serves: when every replica is ready or has failed
        permanently."""
        status = self.status()
        begins = not self._was_ready and ((self._replicas.settled(status) and routers.ready()) or status.state == "READY")
        self._replica_notices.follow(status)
        if begins:
            self._publish(status)
            self._was_ready = True
            self._notify(Notice(kind="ready", subject=status.name, text=status.url, seconds=status.age_s))

    def _publish(self, status: DeploymentStatus) -> None:
        """Write the join file, with which other deployments join our routers, if the routers can be reached."""
        config, desired = self.config, self._desired
        assert desired is not None
        if config.back.host and config.rpc.host and not desired.endpoints.prefix:
            key = desired.endpoints.addresses[0].server_key
            path = join_file.publish(config, desired.endpoints.addresses, key, desired.model_cards, status.url)
            self._notify(Notice(kind="join", subject=config.name, text=str(path)))

    def _end(self) -> list[int]:
        """Let the routers finish, then drain the gangs, then kill remaining processes. Returns pids that do not die."""
        grace = self.config.drain_grace_s
        self._replicas.end_with_host()
        if self._routers is not None:
            self._end_routers(self._routers, grace)
        return self._replicas.end(self._desired.gangs if self._desired is not None else [], grace, lambda: self._stops > 1)

    def _end_routers(self, routers: RouterSource, grace: float) -> None:
        if self._stops > 1:
            routers.stop(0.0)
            return
        done = threading.Event()

        def stop() -> None:
            routers.stop(grace + 1.0)
            done.set()

        threading.Thread(target=stop, name="router farewell", daemon=True).start()
        while not done.wait(TICK_S):
            if self._stops > 1:
                routers.stop(0.0)
                done.wait(FAREWELL_S)
                return

    def status(self) -> DeploymentStatus:
        """The deployment's status table, from the last reports of the controller and the routers."""
        facts = HostFacts(
            started_at=self._started_at,
            stopping=self._stops > 0,
            was_ready=self._was_ready,
            update=self._desired.report() if self._desired is not None else None,
        )
        return self._replicas.describe(self.config, self._routers, facts)

    def _handle_command(self, command: ControlCommand) -> ControlReply:
        match command.do:
            case "drain":
                if not self._replicas.drain(command.name):
                    raise NotFound(
                        f"replica {command.name!r} does not run", "no living gang has this name", "trireme status -o wide names them"
                    )
            case "down":
                self.stop(now=command.now)
            case "update":
                return ControlReply(update=self._begin_update(command.update))
            case "hardware":
                if self._desired is None:
                    raise Rejected(f"{self.config.name} is {self.status().state}", "what it runs on is not known yet", "wait")
                return ControlReply(hardware=self._desired.hardware)
        return ControlReply(status=self.status())

    def _begin_update(self, command: UpdateCommand | None) -> UpdateReport:
        """Called in the control socket's thread; the loop starts the update in its next turn."""
        if command is None:
            raise Rejected("an update needs a configuration")
        self._replicas.check_update(self.config.name)
        state = self.status().state
        if self._desired is None or state not in ("READY", "DEGRADED"):
            raise Rejected(f"{self.config.name} is {state}", "an update goes from one serving configuration to another", "wait")
        return self._desired.begin_update(command, self._replicas.views(), self._clock.at(time.monotonic()))


def up(
    config: Config, *, routers_only: bool = False, notify: Notify = log_notice, progress: Progress = silent,
    on_turn: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Host a deployment in this process until SIGTERM, SIGINT or ``down``; a second one does not wait. Returns the exit code.

    ``routers_only``: it launches no replicas; those of other deployments join its routers.

    Must run in the main thread. Raises ConfigError, ArtifactError or EnvironmentFault when it cannot start; then nothing is left running.
    """
    replicas = ExternalReplicas(config) if routers_only else None
    deployment = Deployment(config, replicas=replicas, notify=notify, progress=progress, on_turn=on_turn)
    before = {number: signal.signal(number, lambda *_: deployment.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return deployment.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_launcher(config: Config, env: Mapping[str, str], notify: Notify) -> Config:
    """The launcher of a configuration that does not set it: Ray if there is a cluster to join or the file describes an own one, else this
    host. ``notify`` gets the choice and its reason."""
    if config.launcher != AUTO:
        return config
    if address := ray_cluster.running(config.ray, env):
        text, ray = f"launcher ray (a cluster is at {address})", msgspec.structs.replace(config.ray, address=address)
        config = msgspec.structs.replace(config, launcher="ray", ray=ray)
    elif config.ray != RayConfig():
        text, config = "launcher ray (the file describes one)", msgspec.structs.replace(config, launcher="ray")
    else:
        why = "RAY_ADDRESS is not set, and no Ray was started on this host"
        text, config = f"launcher local ({why})", msgspec.structs.replace(config, launcher="local")
    notify(Notice(kind="settings", subject=config.name, text=text))
    return config
