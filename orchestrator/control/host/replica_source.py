"""The source of a deployment's replicas: its own controller, or other deployments that join its routers.

Owns the connection to the controller and to Ray. The host's loop calls it from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from orchestrator.config.deployment_file import Config, ModelConfig, environment
from orchestrator.config.engine_settings import GangRequest
from orchestrator.control.controller import LONGEST_ROUND_S, NO_EPOCHS, TICK_S, Controller, Epochs, Hung
from orchestrator.control.host import deployment_plan, join_file
from orchestrator.control.host.control_socket import DeploymentStatus
from orchestrator.control.host.deployment_plan import ServedModel
from orchestrator.control.host.host_checks import check_installed, check_mpi, check_shared_memory
from orchestrator.control.host.notices import Notice, Notify
from orchestrator.control.host.router_source import RouterSource
from orchestrator.control.host.status_table import HostFacts, describe, describe_routers_only
from orchestrator.control.launch import node_hardware, ray_cluster
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.local_launcher import LocalLauncher
from orchestrator.control.launch.mpiexec import MpiInstall, look_for_mpi
from orchestrator.control.launch.supervisor import sweep
from orchestrator.control.reconciler import ReplicaView, RestartPolicy
from orchestrator.files import make_private
from orchestrator.planner.automatic import ClusterHardware, GangDecision, NodeHardware
from workers.artifacts.convert import Progress
from workers.protocol.errors import ConfigError, EnvironmentFault, Rejected, ReplicaLost
from workers.protocol.running_clock import RunningClock
from workers.protocol.specs import Parallel

#: Additional time after the grace for the last messages, kills and the check that nothing is left, seconds.
FAREWELL_S = 15.0


class ReplicaController(Protocol):
    """The controller, in this process or in a Ray actor."""

    def apply(self, gangs: list[GangSpec]) -> None: ...
    def drain(self, replica: str) -> bool: ...
    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None: ...
    def views(self) -> list[ReplicaView]: ...
    def end_with_host(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class ReplicaSource(Protocol):
    """The host's interface to its replicas, its own or those of other deployments."""

    def check(self) -> None:
        """Raises :class:`ConfigError` or :class:`EnvironmentFault` for a configuration that can never work on this host."""

    def resolve(self, models: Sequence[ModelConfig], progress: Progress) -> list[ServedModel]:
        """The files of the models that this host needs, with all settings of their replicas decided. Raises what
        :mod:`orchestrator.model_store` and :mod:`orchestrator.planner.automatic` raise."""

    @property
    def hardware(self) -> ClusterHardware:
        """The hardware of the replicas before they were started. Known once the models are resolved."""

    def start(self, models: Sequence[ServedModel]) -> str:
        """Prepare the launch. Returns the address at which gangs on other nodes reach this host; empty if there are no other nodes."""

    def apply(self, gangs: list[GangSpec]) -> None:
        """Set the wanted gangs."""

    def drain(self, replica: str) -> bool:
        """Replace one replica gracefully; False when it does not run."""

    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None:
        """One turn of the host's loop. ``hung``: ready gangs, (replica, epoch), that the routers lost; ``epochs``: the newest they know."""

    def views(self) -> list[ReplicaView]:
        """The controller's last view of each replica."""

    def describe(self, config: Config, routers: RouterSource | None, facts: HostFacts) -> DeploymentStatus:
        """The status table."""

    def settled(self, status: DeploymentStatus) -> bool:
        """Before the first READY: whether every replica is ready or has failed. Raises the cause if all have failed permanently."""

    def check_update(self, deployment: str) -> None:
        """Raises :class:`Rejected` if an update is not possible."""

    def end_with_host(self) -> None:
        """From now on, a host that is killed leaves no gang."""

    def end(self, gangs: Sequence[GangSpec], grace_s: float, hurry: Callable[[], bool]) -> list[int]:
        """Drain all gangs and kill what is left, at once when ``hurry`` says so; returns pids that do not die."""


class OwnReplicas:
    """Replicas that a controller launches, on this host or on a Ray cluster."""

    def __init__(self, config: Config, notify: Notify) -> None:
        self._config, self._notify = config, notify
        self._mpi: MpiInstall | None = None
        self._hardware: ClusterHardware | None = None
        self._layouts: dict[str, Parallel] = {}
        self._ray: ray_cluster.RayCluster | None = None
        self._controller: ReplicaController | None = None
        self._leave_ray: Callable[[], None] | None = None

    def check(self) -> None:
        self._mpi = look_for_mpi(environment().get("PATH", ""))
        check_installed(self._config)
        check_mpi(self._config.launcher, [(each.engine, each.layout) for model in self._config.models for each in model.gangs()], self._mpi)

    def resolve(self, models: Sequence[ModelConfig], progress: Progress) -> list[ServedModel]:
        config = self._config
        requests = [request for model in models for request in model.gangs()]
        # An existing cluster is joined first, because its nodes report their hardware. An own cluster is started after all other checks.
        if config.launcher == "ray" and ray_cluster.configured(config.ray, environment()):
            self._join_ray(cpus=0)
        self._hardware = self._look(requests)
        decisions = deployment_plan.decide_settings(models, self._hardware, config.cache, progress)
        check_mpi(config.launcher, [(each.request.engine, each.parallel) for each in decisions], self._mpi)
        check_shared_memory(config.launcher, [each.parallel for each in decisions], self._mpi)
        for text, names in _summaries(decisions).items():
            self._notify(Notice(kind="settings", subject=", ".join(names), text=text))
        return deployment_plan.resolve_models(models, decisions, config.cache, progress)

    def _look(self, requests: Sequence[GangRequest]) -> ClusterHardware:
        """The hardware of the replicas. Devices that no replica could use are not searched for."""
        joined = self._ray is not None
        if all(request.engine == "fake" for request in requests):
            return ClusterHardware(nodes=(NodeHardware(),), grows=joined)
        gpus = any(request.engine != "fake" and request.settings.device != "cpu" for request in requests)
        if joined:
            return ray_cluster.look(gpus=gpus)
        here = node_hardware.look(environment(), gpus=gpus)
        if self._config.launcher == "ray" and self._config.ray.num_gpus >= 0:
            here = msgspec.structs.replace(here, gpus=here.gpus[: self._config.ray.num_gpus])
        return ClusterHardware(nodes=(here,))

    @property
    def hardware(self) -> ClusterHardware:
        assert self._hardware is not None
        return self._hardware

    def start(self, models: Sequence[ServedModel]) -> str:
        policy = RestartPolicy(start_timeout_s=self._config.start_timeout_s, drain_grace_s=self._config.drain_grace_s)
        if self._config.launcher == "ray":
            shares = sum(gang.parallel.world * model.config.cpus_per_rank for model in models for gang in model.gangs)
            joined = self._ray or self._join_ray(cpus=self._config.ray.num_cpus or int(shares + 0.999) + 1)
            from orchestrator.control.ray_controller import RemoteController

            self._controller = RemoteController(self._config.name, self._config.home / "target.json", policy)
            return "" if joined.started else joined.here  # a cluster of one node may grow
        assert self._config.launcher == "local"
        self._controller = Controller(LocalLauncher(self._mpi, environment()), policy)
        return ""

    def _join_ray(self, *, cpus: int) -> ray_cluster.RayCluster:
        """``cpus``: CPU shares of a Ray that is started here."""
        config, begun = self._config, time.time()
        make_private(config.home / "keys")
        joined = self._ray = ray_cluster.join(config.ray, config.home, environment(), cpus=cpus)
        self._leave_ray = ray_cluster.leave
        what = "started" if joined.started else "joined"
        text = f"{what}, {len(joined.addresses)} node{'s' if len(joined.addresses) > 1 else ''}"
        self._notify(Notice(kind="ray", subject=joined.here, text=text, seconds=time.time() - begun))
        wait, need = ray_cluster.stop_wait_s(environment()), config.drain_grace_s + FAREWELL_S
        if wait is not None and wait < need:
            text = f"it is killed {wait:g} s after it was ordered to stop, and draining may take {need:g} s: set RAY_JOB_STOP_WAIT_TIME_S"
            self._notify(Notice(kind="warning", subject="Ray job", text=text))
        return joined

    def apply(self, gangs: list[GangSpec]) -> None:
        assert self._controller is not None
        self._layouts |= {gang.replica.name: gang.replica.parallel for gang in gangs}
        self._controller.apply(gangs)

    def drain(self, replica: str) -> bool:
        return self._controller is not None and self._controller.drain(replica)

    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None:
        assert self._controller is not None
        self._controller.tick(hung, epochs)

    def views(self) -> list[ReplicaView]:
        return self._controller.views() if self._controller is not None else []

    def describe(self, config: Config, routers: RouterSource | None, facts: HostFacts) -> DeploymentStatus:
        return describe(config, self.views(), self._layouts, routers, facts)

    def settled(self, status: DeploymentStatus) -> bool:
        states = [row.state for model in status.models for row in model.replicas]
        failed = [view for view in self.views() if view.phase == "failed"]
        if not failed or not set(states) <= {"READY", "FAILED"}:
            return False
        if "READY" not in states:
            first = failed[0]
            kind = {ConfigError.exit_code: ConfigError, EnvironmentFault.exit_code: EnvironmentFault}.get(first.exit_code, ReplicaLost)
            logs = self._config.home / "replicas" / first.name
            raise kind(f"replica {first.name} cannot start", first.cause, first.hint or f"its logs: {logs}")
        return True

    def check_update(self, deployment: str) -> None:
        """Any of them can be replaced."""

    def end_with_host(self) -> None:
        if self._controller is not None:
            self._controller.end_with_host()

    def end(self, gangs: Sequence[GangSpec], grace_s: float, hurry: Callable[[], bool]) -> list[int]:
        left: list[int] = []
        try:
            if self._controller is not None:
                self._drain_all(self._controller, grace_s, hurry)
        finally:
            if self._controller is not None:
                left = sweep(gangs)
            if self._leave_ray is not None:
                self._leave_ray()
        return left

    @staticmethod
    def _drain_all(controller: ReplicaController, grace_s: float, hurry: Callable[[], bool]) -> None:
        clock = RunningClock(time.monotonic(), LONGEST_ROUND_S)
        deadline = time.monotonic() + grace_s + FAREWELL_S
        controller.apply([])
        controller.tick()
        while controller.views() and clock.at(time.monotonic()) < deadline and not hurry():
            time.sleep(TICK_S / 4)
            clock.turn(time.monotonic())
            controller.tick()
        if controller.views() or hurry():
            controller.abort()
        controller.close()


def _summaries(decisions: Sequence[GangDecision]) -> dict[str, list[str]]:
    """The automatic settings in one line -> the replicas that got them. Empty if all settings were given."""
    found: dict[str, list[str]] = {}
    for each in decisions:
        if each.chosen:
            cache = f"; about {each.cache:,} tokens of KV cache" if each.cache and each.engine.device == "cuda" else ""
            found.setdefault(", ".join(each.chosen) + cache, []).append(each.request.name)
    return found


class ExternalReplicas:
    """Replicas of other deployments, which join the routers of this one. This host launches none."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def check(self) -> None:
        join_file.check(self._config)

    def resolve(self, models: Sequence[ModelConfig], progress: Progress) -> list[ServedModel]:
        return [deployment_plan.resolve_tokenizer(model, self._config.cache, progress) for model in models]

    @property
    def hardware(self) -> ClusterHardware:
        return ClusterHardware(nodes=())

    def start(self, models: Sequence[ServedModel]) -> str:
        return ""

    def apply(self, gangs: list[GangSpec]) -> None:
        assert not gangs

    def drain(self, replica: str) -> bool:
        return False

    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None: ...

    def views(self) -> list[ReplicaView]:
        return []

    def describe(self, config: Config, routers: RouterSource | None, facts: HostFacts) -> DeploymentStatus:
        return describe_routers_only(config, routers, facts)

    def settled(self, status: DeploymentStatus) -> bool:
        return True

    def check_update(self, deployment: str) -> None:
        raise Rejected(f"{deployment} has no replicas to update", "it is routers alone", "trireme down, then trireme router")

    def end_with_host(self) -> None: ...

    def end(self, gangs: Sequence[GangSpec], grace_s: float, hurry: Callable[[], bool]) -> list[int]:
        return []
