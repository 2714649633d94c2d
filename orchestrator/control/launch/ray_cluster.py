"""Ray itself: join the cluster that is there, or start one that ends with this process; and the controller actor seen from here.

Owns the connection to Ray. Token authentication is on, usage reports are off. Everything about gangs is in
:mod:`orchestrator.control.launch.ray_launcher`.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.config.deployment_file import RayConfig
from orchestrator.control.controller import ControllerActor, Hung
from orchestrator.control.launch.launcher import GangSpec, Launcher, write_private
from orchestrator.control.reconciler import ReplicaView, RestartPolicy
from workers.protocol.errors import EnvironmentFault

log = logging.getLogger("trireme.ray")
NAMESPACE = "trireme"
_HINT = "pip install 'trireme-llm[ray]', or use --launcher local"
_LOOK = "look at the cluster (ray status), then start the deployment again"
_OBJECT_STORE_BYTES = 80 << 20
#: Ray's own default.
_JOB_STOP_WAIT_S = 3.0
_ANSWER_S = 5.0
#: The opening of an HTTP/2 connection and an empty SETTINGS frame, RFC 9113 section 3.4.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
#: A worker of Ray imports half a gigabyte of packages, on a cluster often from a shared folder.
_START_S = 180.0


class RayCluster(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster that this process has joined. ``addresses``: its nodes; ``here``: this one."""

    here: str
    addresses: tuple[str, ...]
    started: bool


def join(config: RayConfig, home: Path, env: MutableMapping[str, str], *, cpus: int) -> RayCluster:
    """Join ``config.address`` or RAY_ADDRESS; without either, start Ray here with ``cpus`` CPU shares. Raises EnvironmentFault."""
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    address = config.address or env.get("RAY_ADDRESS", "")
    if not address and "RAY_AUTH_TOKEN" not in env and "RAY_AUTH_TOKEN_PATH" not in env:
        token = home / "keys" / "ray_token"
        if not token.exists():
            write_private(token, secrets.token_hex(32).encode())
        env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"] = "token", str(token)
    try:
        import ray
    except ImportError as error:
        raise EnvironmentFault("Ray is not installed", str(error), _HINT) from None
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _reach(address)
        options["address"] = address
    else:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "num_cpus": cpus}
        if config.num_gpus >= 0:
            options["num_gpus"] = config.num_gpus
    try:
        with _stderr_to(home / "ray.log"), _own_signals():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"cannot join Ray at {address}" if address else "cannot start Ray"
        hint = "start it, or name another one (RAY_ADDRESS, ray.address); without an address Ray is started here" if address else _HINT
        raise EnvironmentFault(what, str(error).splitlines()[0][:200], hint) from None
    nodes = tuple(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return RayCluster(here=ray.util.get_node_ip_address(), addresses=nodes, started=not address)


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Keep what Ray's C++ side writes to descriptor 2 off the terminal: real errors come as exceptions."""
    saved, file = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(file)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's way to end: Ray puts a handler of its own over SIGTERM, which would end the host without a grace."""
    held = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in held.items():
                signal.signal(number, handler)


def _reach(address: str) -> None:
    """Ray itself retries for a long time; a port where nobody listens or answers is said within seconds."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as probe:
            probe.sendall(_GREETING)
            probe.recv(1)  # Ray speaks gRPC, whose server greets at once; one that hangs up is left to Ray to explain
    except ConnectionResetError:
        return
    except OSError as error:
        raise EnvironmentFault(
            f"Ray at {address} is not reachable", error.strerror or str(error), "start it, or unset RAY_ADDRESS"
        ) from None


def stop_wait_s(env: Mapping[str, str]) -> float | None:
    """Seconds from SIGTERM to SIGKILL when a Ray job is stopped; None where this process is no Ray job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in env:
        return None
    given = env.get("RAY_JOB_STOP_WAIT_TIME_S", "")
    return float(given) if given.isdigit() else _JOB_STOP_WAIT_S


def leave() -> None:
    """Disconnect; a Ray that we started ends."""
    import ray

    ray.shutdown()


def _make_launcher(deployment: str) -> Launcher:
    from orchestrator.control.launch.ray_launcher import RayLauncher

    return RayLauncher(deployment)


def _end_this_actor() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor)


class RemoteController:
    """The controller actor of a deployment, found by name or made. While Ray restarts it, the last table is shown."""

    def __init__(self, deployment: str, target: Path, policy: RestartPolicy) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._target = target
        # Pinned to this host, where the file of wanted gangs lies.
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
        """Raises :class:`EnvironmentFault` when the controller does not take the order within three minutes."""
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
        """Kill every gang without a grace; returns when they are gone."""
        if self._actor is not None:
            self._call("abort", timeout_s=_START_S)
            self._views, self._question = [], None

    def end_with_host(self) -> None:
        """From now on a killed host leaves nothing: a stopped Ray job is killed after three seconds, whatever it has to finish."""
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

    def tick(self, hung: Hung = ()) -> None:
        """Report what the routers lost and take the table; never waits for the actor."""
        if self._question is None:
            self._question = self._actor.report.remote(sorted(hung))
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
        """End the actor: nothing is wanted any more."""
        if self._actor is not None:
            self._ray.kill(self._actor)
