"""Ray itself: join an existing cluster, or start one that ends with this process.

Owns the connection to Ray. Token authentication is on, usage reports are off. Everything about gangs is in
:mod:`orchestrator.control.launch.ray_launcher`.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.config.deployment_file import RayConfig, environment
from orchestrator.control.launch import node_hardware
from orchestrator.control.launch.gpu_ledger import VISIBLE
from orchestrator.files import write_private
from orchestrator.planner.automatic import ClusterHardware, NodeHardware
from workers.protocol.errors import EnvironmentFault

NAMESPACE = "trireme"
_HINT = "pip install 'trireme-llm[ray]', or use --launcher local"
_OBJECT_STORE_BYTES = 80 << 20
#: Ray's own default.
_JOB_STOP_WAIT_S = 3.0
#: Longest wait for a connection to Ray and for its first byte.
_CONNECT_S = 5.0
#: Longest wait for the hardware reports of a cluster's nodes: a worker's start, and a child with torch.
_LOOK_S = 180.0
log = logging.getLogger("trireme.launch")
#: The opening of an HTTP/2 connection and an empty SETTINGS frame, RFC 9113 section 3.4.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


class RayCluster(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster that this process has joined. ``addresses``: its nodes; ``here``: this one."""

    here: str
    addresses: tuple[str, ...]
    started: bool


def configured(config: RayConfig, env: Mapping[str, str]) -> str:
    """The address of the cluster to join that the configuration or the environment names; empty = start one here."""
    return config.address or env.get("RAY_ADDRESS", "")


def running(config: RayConfig, env: Mapping[str, str]) -> str:
    """The address of the cluster that a deployment of this host would join: the configured one, RAY_ADDRESS, or that of a Ray that was
    started here with ``ray start``; empty if there is none.

    Ray writes its address to a file in a folder that every user can write. So the file counts only if it belongs to this user or root, and
    if a process answers at the address.
    """
    if address := configured(config, env):
        return address
    note = Path(env.get("RAY_TMPDIR") or env.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        if note.lstat().st_uid not in (0, os.getuid()):
            return ""
        address = note.read_text().strip()
        _reach(address)
    except (OSError, EnvironmentFault):
        return ""
    return address


def _look_from_task(gpus: bool) -> bytes:
    """Runs in a worker of the inspected node. Ray hides all GPUs from a task that requests none, and this task must not reserve any."""
    shown = {name: value for name, value in environment().items() if name != VISIBLE}
    return msgspec.json.encode(node_hardware.look(shown, gpus=gpus))


def look(*, gpus: bool) -> ClusterHardware:
    """The hardware of the joined cluster's nodes: those with GPUs if there are any, else all. One task per node reads it. Raises
    :class:`EnvironmentFault` if no node answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if node["Resources"].get("GPU", 0.0) >= 1.0]
    task = ray.remote(_look_from_task)
    asked = {
        task.options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            gpus
        ): int(node["Resources"].get("GPU", 0.0))
        for node in with_gpus or nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_S)
    found = []
    for answer in answered:
        try:
            seen = msgspec.json.decode(ray.get(answer), type=NodeHardware)
        except ray.exceptions.RayError as error:
            log.warning("a node does not report its hardware: %s", error)
            continue
        found.append(msgspec.structs.replace(seen, gpus=seen.gpus[: asked[answer]]))
    if not found:
        raise EnvironmentFault(f"no node of the Ray cluster answered within {_LOOK_S:.0f} s", "its workers do not start", "ray status")
    return ClusterHardware(nodes=tuple(found), grows=True)


def join(config: RayConfig, home: Path, env: MutableMapping[str, str], *, cpus: int) -> RayCluster:
    """Join ``config.address`` or RAY_ADDRESS; without either, start Ray here with ``cpus`` CPU shares. Raises EnvironmentFault."""
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    address = configured(config, env)
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
    except Exception as error:  # Ray raises plain Exception if its processes start slowly, and other types in other cases
        what = f"cannot join Ray at {address}" if address else "cannot start Ray"
        hint = "start it, or name another one (RAY_ADDRESS, ray.address); without an address Ray is started here"
        if not address:
            hint = f"try again when this machine has less to do, or use --launcher local; Ray's own words are in {home / 'ray.log'}"
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentFault(what, why[:200], hint) from None
    nodes = tuple(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return RayCluster(here=ray.util.get_node_ip_address(), addresses=nodes, started=not address)


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Hide what Ray's C++ code writes to descriptor 2: real errors come as exceptions."""
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
    """Keep this process's SIGTERM handler: Ray installs its own one, which would end the host without a grace."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _reach(address: str) -> None:
    """Raises :class:`EnvironmentFault` within seconds if no process answers at the port: Ray itself would retry for a long time."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as probe:
            probe.sendall(_GREETING)
            probe.recv(1)  # Ray uses gRPC, whose server sends a greeting at once; if it closes the connection, Ray's own error explains it
    except ConnectionResetError:
        return
    except OSError as error:
        raise EnvironmentFault(
            f"Ray at {address} is not reachable", error.strerror or str(error), "start it, or unset RAY_ADDRESS"
        ) from None


def stop_wait_s(env: Mapping[str, str]) -> float | None:
    """Seconds from SIGTERM to SIGKILL when a Ray job is stopped; None if this process is not a Ray job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in env:
        return None
    given = env.get("RAY_JOB_STOP_WAIT_TIME_S", "")
    return float(given) if given.isdigit() else _JOB_STOP_WAIT_S


def leave() -> None:
    """Disconnect; a Ray that we started ends."""
    import ray

    ray.shutdown()
