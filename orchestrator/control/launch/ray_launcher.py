"""Gangs on a Ray cluster: a placement group, a supervisor actor and node agents for each.

Owns names and actor handles; each gang belongs to its supervisor. A supervisor is detached (so the death of a controller ends no gang) and
never restarted (its death ends its gang: the kernel kills mpiexec, and Ray kills the node agents that the supervisor owns). Never on the
token path.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.util import get_node_ip_address, list_named_actors
from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.config.deployment_file import environment
from orchestrator.control.launch import mpiexec
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.subprocesses import exit_with, kill_tagged
from orchestrator.control.launch.supervisor import GangNode, GangSupervisor, LocalNode
from orchestrator.control.reconciler import GangStatus
from orchestrator.planner.placement import NodeResources, PlacementRequest, placement_request, scale_up_request
from workers.epoch import make_epoch
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.running_clock import RunningClock

log = logging.getLogger("trireme.launch")
#: Bounds on actors, seconds: an answer to a question, the start of all node agents, silence that counts as death.
_ANSWER_S = 10.0
_AGENTS_S = 60.0
_SILENCE_S = 20.0


class NodeAgent:
    """Starts, checks and kills processes on the node of one bundle."""

    def __init__(self) -> None:
        exit_with(os.getppid())  # a worker may outlive its raylet by many seconds
        env = environment()
        self._own = {name: env[name] for name in mpiexec.NODE_NAMES if name in env}

    def where(self) -> tuple[str, str]:
        """(address, CUDA_VISIBLE_DEVICES) of the bundle."""
        return get_node_ip_address(), self._own.get("CUDA_VISIBLE_DEVICES", "")

    def run(self, tag: str, command: str, env: dict[str, str]) -> None:
        self._node(env).run(tag, command, env)

    def ask(self, tag: str, argv: list[str], env: dict[str, str], bound_s: float) -> tuple[int, str]:
        return self._node(env).ask(tag, argv, env, bound_s)

    def _node(self, env: dict[str, str]) -> LocalNode:
        """This node; variables in ``env`` override those that its agent was started with."""
        own = self._own | {name: value for name, value in env.items() if name in mpiexec.NODE_NAMES}
        return LocalNode(0, get_node_ip_address(), own)

    def kill(self, tag: str) -> list[int]:
        return kill_tagged(tag)


class RemoteNode:
    """A node as the gang sees it, reached through the agent of one of its bundles."""

    def __init__(self, agent: Any, address: str, ranks: int, devices: str) -> None:
        self.address, self.ranks = address, ranks
        self._agent, self._devices = agent, devices

    def run(self, tag: str, command: str, env: Mapping[str, str]) -> None:
        own = {"CUDA_VISIBLE_DEVICES": self._devices} if self._devices else {}
        try:
            ray.get(self._agent.run.remote(tag, command, {**env, **own}), timeout=_ANSWER_S)
        except ray.exceptions.RayError as error:
            raise EnvironmentFault(f"node {self.address} does not start its ranks", type(error).__name__) from None

    def ask(self, tag: str, argv: Sequence[str], env: Mapping[str, str], bound_s: float) -> tuple[int, str]:
        own = {"CUDA_VISIBLE_DEVICES": self._devices} if self._devices else {}
        try:
            answer: tuple[int, str] = ray.get(self._agent.ask.remote(tag, list(argv), {**env, **own}, bound_s), timeout=bound_s + _ANSWER_S)
        except ray.exceptions.RayError as error:
            raise EnvironmentFault(f"node {self.address} does not check itself", type(error).__name__, "look at that node") from None
        return answer

    def kill(self, tag: str) -> list[int]:
        try:
            left: list[int] = ray.get(self._agent.kill.remote(tag), timeout=_ANSWER_S)
        except ray.exceptions.RayActorError:
            return []  # its children died with it
        except ray.exceptions.RayError as error:
            log.error("node %s does not answer: %s", self.address, type(error).__name__)
            return []
        return left


class SupervisorActor:
    """A gang in an actor on bundle 0's node; the actor is also the agent of bundle 0."""

    def __init__(self, name: str, spec: bytes, epoch: int, ranks: list[int]) -> None:
        exit_with(os.getppid())
        gang = msgspec.json.decode(spec, type=GangSpec)
        env = dict(environment())
        group = get_placement_group(name)
        self._agents = [
            ray.remote(NodeAgent)
            .options(
                name=f"{name}/agent{index}",
                num_cpus=gang.share.cpus * count,
                num_gpus=gang.share.gpus * count,
                max_restarts=0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            )
            .remote()
            for index, count in enumerate(ranks)
            if index > 0
        ]
        nodes = self._nodes(ranks, env)
        self._gang = GangSupervisor(gang, epoch, nodes, mpi=mpiexec.look_for_mpi(env.get("PATH", "")), env=env)
        self._gang.start()

    def _nodes(self, ranks: list[int], env: Mapping[str, str]) -> list[GangNode]:
        """Bundles on the same node are merged, because Hydra runs one proxy per host."""
        here = get_node_ip_address()
        devices = [env.get("CUDA_VISIBLE_DEVICES", "")]
        addresses = [here]
        for address, visible in ray.get([agent.where.remote() for agent in self._agents], timeout=_AGENTS_S):
            addresses.append(address)
            devices.append(visible)
        nodes: list[GangNode] = []
        for address in dict.fromkeys(addresses):
            bundles = [index for index, where in enumerate(addresses) if where == address]
            visible = ",".join(filter(None, (devices[index] for index in bundles)))
            count = sum(ranks[index] for index in bundles)
            if address == here:
                nodes.append(LocalNode(count, address, {"CUDA_VISIBLE_DEVICES": visible} if visible else {}))
            else:
                nodes.append(RemoteNode(self._agents[bundles[0] - 1], address, count, visible))
        return nodes

    def status(self) -> bytes:
        return msgspec.json.encode(self._gang.status())

    def drain(self) -> None:
        self._gang.drain()

    def kill(self) -> list[int]:
        return self._gang.kill()


class _Record(msgspec.Struct, kw_only=True):
    """The launcher's record of one gang."""

    status: GangStatus
    spec: GangSpec | None = None
    placement: PlacementRequest | None = None
    supervisor: Any = None
    question: Any = None
    asked: float = 0.0
    killing: Any = None
    failed: bool = False


class RayLauncher:
    """Launcher on the cluster that this process is connected to; everything it makes is named ``trireme/<deployment>/<replica>/<epoch>``.

    Called from one thread. The constructor finds the gangs of an earlier controller.
    """

    def __init__(self, deployment: str) -> None:
        self._prefix = f"trireme/{deployment}/"
        self._records: dict[tuple[str, int], _Record] = {}
        self._clock = RunningClock(time.monotonic(), _ANSWER_S / 2)
        self._adopt()

    def _adopt(self) -> None:
        """Find living supervisors by name; groups without a supervisor were left by a controller that died during a launch."""
        questions = {}
        for name in list_named_actors():
            if (key := self._parse(name)) is not None:
                record = self._records[key] = _Record(status=_status(key, "starting"), supervisor=ray.get_actor(name))
                questions[key] = record.question = record.supervisor.status.remote()
        if questions:
            ray.wait(list(questions.values()), num_returns=len(questions), timeout=_ANSWER_S)
        for key in questions:
            record = self._records[key]
            self._ask(record)
            if record.question is not None:
                self._mark_failed(record, "its supervisor did not answer a new controller")
            log.info("adopted %s: %s", self._name(key), record.status.phase)
        for row in placement_group_table().values():
            key = self._parse(row["name"])
            if key is not None and key not in self._records and row["state"] != "REMOVED":
                self._remove_group(row["name"])

    @property
    def _now(self) -> float:
        """Seconds in which this launcher's loop ran."""
        return self._clock.at(time.monotonic())

    def _parse(self, name: str) -> tuple[str, int] | None:
        replica, _, epoch = name.removeprefix(self._prefix).partition("/")
        return (replica, int(epoch)) if name.startswith(self._prefix) and epoch.isdigit() else None

    def _name(self, key: tuple[str, int]) -> str:
        return f"{self._prefix}{key[0]}/{key[1]}"

    def start(self, spec: GangSpec) -> None:
        key = (spec.replica.name, make_epoch(spec.last_epoch))
        self._records[key] = _Record(spec=spec, status=_status(key, "placing", spec.revision))
        self._reserve(key, self._records[key])

    def _reserve(self, key: tuple[str, int], record: _Record) -> None:
        """Create the placement group that fits the present cluster. If the cluster is too small, the group stays pending, which makes Ray's
        autoscaler add nodes."""
        assert record.spec is not None
        nodes = [
            NodeResources(
                address=node["NodeManagerAddress"], cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0)
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        spec = record.spec
        try:
            placement = placement_request(spec.replica.name, spec.replica.parallel, spec.share, nodes, spread=spec.spread)
        except ConfigError as fault:
            record.status = msgspec.structs.replace(record.status, cause=str(fault), hint=fault.hint)
            placement = scale_up_request(spec.replica.parallel, spec.share, spread=spec.spread)
        else:
            record.status = msgspec.structs.replace(record.status, cause="", hint="")
        if placement == record.placement:
            return
        if record.placement is not None:
            record.placement = None
            self._remove_group(self._name(key))
        placement_group(placement.bundles(), strategy=placement.strategy, name=self._name(key), lifetime="detached")
        record.placement = placement

    def poll(self) -> list[GangStatus]:
        self._clock.turn(time.monotonic())
        for key, record in list(self._records.items()):
            if record.killing is not None:
                self._finish_kill(key, record)
            elif record.supervisor is not None:
                self._ask(record)
            elif record.placement is not None and placement_group_table(get_placement_group(self._name(key)))["state"] == "CREATED":
                self._supervise(key, record)
            else:
                self._reserve(key, record)
        return [record.status for record in self._records.values()]

    def _supervise(self, key: tuple[str, int], record: _Record) -> None:
        assert record.spec is not None and record.placement is not None
        name, share, ranks = self._name(key), record.spec.share, record.placement.ranks
        record.supervisor = (
            ray.remote(SupervisorActor)
            .options(
                name=name,
                lifetime="detached",
                num_cpus=share.cpus * ranks[0],
                num_gpus=share.gpus * ranks[0],
                max_restarts=0,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(get_placement_group(name), 0),
            )
            .remote(name, msgspec.json.encode(record.spec), key[1], list(ranks))
        )
        record.status = msgspec.structs.replace(record.status, phase="starting", since=time.time(), cause="", hint="")
        # Agents and MPI are started in its constructor, so its first answer may take that long.
        record.asked = self._now + _AGENTS_S

    def _ask(self, record: _Record) -> None:
        """Read the answer to the last status call, if it has arrived, and send the next call."""
        now = self._now
        if record.failed:
            return
        if record.question is None:
            record.question = record.supervisor.status.remote()
            record.asked = max(record.asked, now)
        ready, _ = ray.wait([record.question], timeout=0)
        if not ready:
            if now - record.asked > _SILENCE_S:
                self._mark_failed(record, f"its supervisor has not answered for {_SILENCE_S:.0f} s")
            return
        try:
            record.status = msgspec.json.decode(ray.get(record.question), type=GangStatus)
        except ray.exceptions.RayActorError as error:
            why = next(
                (line for line in reversed(str(error).splitlines()) if "Error" in line or "Fault" in line), "killed, or its node is lost"
            )
            self._mark_failed(record, f"its supervisor died: {why.strip()}")
        except ray.exceptions.RayTaskError as error:
            self._mark_failed(record, f"its supervisor failed: {error.cause}")
        record.question, record.asked = None, 0.0

    @staticmethod
    def _mark_failed(record: _Record, cause: str) -> None:
        record.failed = True
        record.status = msgspec.structs.replace(record.status, phase="failed", cause=cause, since=time.time())

    def drain(self, name: str, epoch: int) -> None:
        record = self._records.get((name, epoch))
        if record is not None and record.supervisor is not None:
            record.supervisor.drain.remote()

    def kill(self, name: str, epoch: int) -> None:
        record = self._records.get((name, epoch))
        if record is None or record.killing is not None:
            return
        if record.supervisor is None or record.failed:
            self._remove((name, epoch), record)
            return
        record.killing = record.supervisor.kill.remote()
        record.asked = self._now

    def _finish_kill(self, key: tuple[str, int], record: _Record) -> None:
        ready, _ = ray.wait([record.killing], timeout=0)
        if not ready and self._now - record.asked < _SILENCE_S:
            return
        if ready:
            try:
                if left := ray.get(record.killing):
                    log.error("%s: processes %s do not die", self._name(key), left)
                    record.killing, record.asked = record.supervisor.kill.remote(), self._now
                    return
            except ray.exceptions.RayError as error:
                log.warning("%s: %s while it was killed", self._name(key), type(error).__name__)
        self._remove(key, record)

    def _remove(self, key: tuple[str, int], record: _Record) -> None:
        if record.supervisor is not None:
            ray.kill(record.supervisor)
        self._remove_group(self._name(key))
        del self._records[key]

    @staticmethod
    def _remove_group(name: str) -> None:
        try:
            remove_placement_group(get_placement_group(name))
        except ValueError:
            return  # removed already

    def close(self) -> None:
        """Supervisors outlive a launcher."""


def _status(key: tuple[str, int], phase: Any, revision: str = "") -> GangStatus:
    return GangStatus(name=key[0], epoch=key[1], revision=revision, phase=phase, since=time.time())
