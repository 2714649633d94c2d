"""The controller in a Ray actor: the actor itself, and its client in the host process.

Owns the actor's loop and its file of wanted gangs. The actor outlives the host; the next host finds the actor by name.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.control.controller import NO_EPOCHS, TICK_S, Controller, Epochs, Hung
from orchestrator.control.launch.launcher import GangSpec, Launcher
from orchestrator.control.reconciler import ReplicaView, RestartPolicy
from orchestrator.files import write_private
from workers.protocol.errors import EnvironmentFault, TriremeError

log = logging.getLogger("trireme.controller")
_LOOK = "look at the cluster (ray status), then start the deployment again"
#: Longest wait for an answer of a running actor, seconds.
_ANSWER_S = 5.0
#: Longest wait for the start of the actor, seconds: a worker of Ray imports half a gigabyte of packages, often from a shared folder.
_START_S = 180.0


class ControllerActor:
    """The loop inside a Ray actor. The wanted gangs are in the file ``target`` (0600), so that Ray can restart the actor with the same
    arguments. ``end``: ends this actor permanently.
    """

    def __init__(self, target: str, policy: bytes, make_launcher: Callable[[], Launcher], end: Callable[[], None]) -> None:
        self._target, self._end = Path(target), end
        self._controller = Controller(make_launcher(), msgspec.json.decode(policy, type=RestartPolicy))
        self._hung: frozenset[tuple[str, int]] = frozenset()
        self._epochs: Epochs = NO_EPOCHS
        self.apply()
        threading.Thread(target=self._loop, name="control loop", daemon=True).start()

    def apply(self) -> bytes:
        """Read the wanted gangs again; returns the table after one round with them."""
        self._controller.apply(msgspec.json.decode(self._target.read_bytes(), type=list[GangSpec]))
        self._controller.tick(self._hung, self._epochs)
        return msgspec.json.encode(self._controller.views())

    def drain(self, replica: str) -> bool:
        return self._controller.drain(replica)

    def abort(self) -> None:
        self._controller.abort()

    def end_with(self, pid: int) -> None:
        """The host, process ``pid`` of this node, is ending. If it is killed before its gangs end, this actor ends them and itself."""
        threading.Thread(target=self._end_gangs_after, args=(os.pidfd_open(pid),), name="end gangs of host", daemon=True).start()

    def _end_gangs_after(self, host: int) -> None:
        select.select([host], [], [])
        log.warning("the host was killed while it ended: ending its gangs")
        write_private(self._target, b"[]")
        self.apply()
        while self._target.read_bytes() == b"[]":  # else a new host has taken over
            if not self._controller.views():
                self._end()
                return
            time.sleep(TICK_S)

    def report(self, hung: list[tuple[str, int]], epochs: dict[str, int]) -> bytes:
        """``hung``: gangs that the routers lost; ``epochs``: what they know. Returns the table of replicas as JSON."""
        self._epochs = epochs
        self._hung = frozenset((name, epoch) for name, epoch in hung)
        return msgspec.json.encode(self._controller.views())

    def _loop(self) -> None:
        while True:
            try:
                self._controller.tick(self._hung, self._epochs)
            except TriremeError as error:
                log.error("control loop: %s", error)
            except Exception:
                # The edge of a task: after any exception of Ray while its control plane is down, the next round tries again.
                log.exception("control loop")
            time.sleep(TICK_S)


def _make_launcher(deployment: str) -> Launcher:
    from orchestrator.control.launch.ray_launcher import RayLauncher

    return RayLauncher(deployment)


def _end_this_actor() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor)


class RemoteController:
    """The controller actor of a deployment, found by name or created. While Ray restarts it, the last table is returned."""

    def __init__(self, deployment: str, target: Path, policy: RestartPolicy) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._target = target
        # Pinned to this host, because the file of wanted gangs is here.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._make = (
            ray.remote(ControllerActor)
            .options(
                name=f"trireme/{deployment}/controller",
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_concurrency=4,
                num_cpus=0,
                scheduling_strategy=node,
            )
            .remote
        )
        self._arguments = (str(target), msgspec.json.encode(policy), functools.partial(_make_launcher, deployment), _end_this_actor)
        self._actor: Any = None
        self._views: list[ReplicaView] = []
        self._question: Any = None
        self._silent_since = 0.0

    def apply(self, gangs: Sequence[GangSpec]) -> None:
        """Raises :class:`EnvironmentFault` if the controller does not accept the order within three minutes."""
        write_private(self._target, msgspec.json.encode(list(gangs)))
        if self._actor is None and not gangs:
            return
        if self._actor is None:
            self._actor = self._make(*self._arguments)
        self._views = msgspec.json.decode(self._call("apply", timeout_s=_START_S), type=list[ReplicaView])
        self._question = None

    def drain(self, replica: str) -> bool:
        return bool(self._call("drain", replica, timeout_s=_ANSWER_S))

    def abort(self) -> None:
        """Kill every gang without a grace; returns when none is left."""
        if self._actor is not None:
            self._call("abort", timeout_s=_START_S)
            self._views, self._question = [], None

    def end_with_host(self) -> None:
        """From now on the gangs end even if the host is killed: Ray kills a stopped job after three seconds, even if it is still
        draining."""
        if self._actor is None:
            return
        try:
            self._call("end_with", os.getpid(), timeout_s=_ANSWER_S)
        except EnvironmentFault as fault:
            log.warning("%s; a host that is killed now leaves its gangs", fault)

    def _call(self, method: str, *arguments: object, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._ray.get(getattr(self._actor, method).remote(*arguments), timeout=max(0.1, deadline - time.monotonic()))
            except self._ray.exceptions.ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise EnvironmentFault("the controller does not answer", "Ray has not restarted it", _LOOK) from None
                time.sleep(0.1)
            except self._ray.exceptions.RayError as error:
                raise EnvironmentFault("the controller does not answer", str(error).splitlines()[0][:200], _LOOK) from None

    def tick(self, hung: Hung = (), epochs: Epochs = NO_EPOCHS) -> None:
        """Report the routers' lost gangs and known epochs, and get the table; never waits for the actor."""
        if self._question is None:
            self._question = self._actor.report.remote(sorted(hung), dict(epochs))
            self._silent_since = time.monotonic()
        ready, _ = self._ray.wait([self._question], timeout=0)
        if not ready:
            if time.monotonic() - self._silent_since > _START_S:
                self._question = None
            return
        question, self._question = self._question, None
        try:
            self._views = msgspec.json.decode(self._ray.get(question), type=list[ReplicaView])
        except self._ray.exceptions.RayError as error:
            log.warning("control plane down: %s; what is served goes on", type(error).__name__)

    def views(self) -> list[ReplicaView]:
        return self._views

    def close(self) -> None:
        """End the actor, because no gang is wanted any more."""
        if self._actor is not None:
            self._ray.kill(self._actor)
