"""Checks of this host before a deployment is started. Owns nothing, starts nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import psutil

from orchestrator.auth.api_keys import parse_api_keys
from orchestrator.config.deployment_file import Config
from orchestrator.config.router_spec import HttpConfig
from orchestrator.control.launch.mpiexec import MpiInstall, none_found
from orchestrator.files import read_private
from orchestrator.router.http.tls import make_context
from workers.protocol.errors import EnvironmentFault
from workers.protocol.specs import EngineKind, Parallel

_LONGEST_SOCKET_PATH = 100
#: Where MPI keeps what the ranks of a host share; what a gang takes there at least, and what each of its ranks takes, bytes.
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED, SHARED_A_RANK = 24 << 20, 8 << 20


def check_installed(config: Config) -> None:
    """Raises :class:`EnvironmentFault` naming a missing package that replicas launched from here need."""
    if config.launcher == "ray" and find_spec("ray") is None:
        raise EnvironmentFault("Ray is not installed", "launcher: ray", "pip install 'trireme-llm[ray]', or use --launcher local")
    engines = {request.engine for model in config.models for request in model.gangs()}
    if config.launcher == "local" and "portable" in engines and find_spec("torch") is None:
        raise EnvironmentFault("torch is not installed", "the portable engine computes with it", "pip install 'trireme-llm[torch]'")


def check_mpi(launcher: str, replicas: Iterable[tuple[EngineKind, Parallel | None]], mpi: MpiInstall | None) -> None:
    """Raises :class:`EnvironmentFault` if replicas need MPI and none was found. Replicas of TensorRT-LLM need it, replicas of several ranks
    (except fake ones), and all replicas on Ray, whose nodes are not known yet. A layout of None is not decided yet."""
    needed = [kind == "trtllm" or (kind == "portable" and layout is not None and layout.world > 1) for kind, layout in replicas]
    if mpi is None and (any(needed) or launcher == "ray"):
        raise none_found()


def shared_memory_needed(worlds: Iterable[int]) -> int:
    """Bytes of shared memory that gangs of so many ranks each take on one host, by what MPICH was measured to take, and some more."""
    return sum(max(LEAST_SHARED, ranks * SHARED_A_RANK) for ranks in worlds if ranks > 1)


def check_shared_memory(launcher: str, replicas: Iterable[Parallel], mpi: MpiInstall | None) -> None:
    """Raises :class:`EnvironmentFault` where the gangs of this host do not fit into its shared memory: MPI would end them by SIGBUS or
    SIGSEGV, whenever they start."""
    needed = shared_memory_needed(layout.world for layout in replicas) if launcher == "local" and mpi is not None else 0
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = psutil.disk_usage(str(SHARED_MEMORY)).free
    if free < needed:
        what = f"{SHARED_MEMORY} has {free >> 20} MiB free, and the replicas of this host need {needed >> 20} MiB"
        raise EnvironmentFault(
            what, "the ranks of a replica exchange their messages there", "docker run --shm-size=1g, or mount a larger tmpfs there"
        )


def check_socket_path(home: Path) -> None:
    """Raises :class:`EnvironmentFault` if the run folder's path is too long for Unix sockets."""
    if len(str(home / "routers" / "router00-back.sock")) > _LONGEST_SOCKET_PATH:
        raise EnvironmentFault(f"{home} is too long for Unix sockets", "their paths end at 107 bytes", "choose a shorter --run-dir")


def check_port(http: HttpConfig) -> None:
    """Raises :class:`EnvironmentFault` naming the process that listens on the HTTP port."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            listeners = [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == http.port and c.pid]
            why = f"pid {listeners[0]} listens on it" if listeners else error.strerror or str(error)
            raise EnvironmentFault(f"port {http.port} on {http.host} is taken", why, "choose another --port; 0 = any free one") from None


def check_api_keys(config: Config) -> str:
    """A warning about an HTTP API that is open to all, or that others can overhear; else nothing. The routers read keys and certificates
    themselves, but later: this is before anything is fetched. Raises :class:`ConfigError`."""
    if config.http.tls is not None:
        make_context(config.http.tls)
    if (file := config.api_keys_file) is not None:
        parse_api_keys(read_private(file))
    elif config.http.exposed:
        return "whoever reaches it can use the models: it has no API keys, by insecure_http_without_keys"
    if config.http.exposed and config.http.tls is None:
        return "keys and prompts cross the network unencrypted: it has no TLS, by insecure_http_without_tls"
    return ""
