"""Pre-flight of a job: what every node found, judged together before Ray is started. Looking is bounded; judging is pure.

Owns nothing. A verdict that is not ok says what to do.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from orchestrator.control.launch.mpiexec import find_mpi
from workers.engines.trtllm.node_probe import gpus, installed_versions
from workers.protocol.errors import EnvironmentFault

#: Clocks: logs and epochs of two jobs are compared by time. More than the first gives a warning, more than the second is refused; seconds.
SKEW_TOLD_S, SKEW_REFUSED_S = 2.0, 60.0
_SHM_BYTES = 1 << 30
_SLOW_NAME_S = 1.0
_ONE_PYTHON = "use one Python environment on a shared file system"
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_MUST_AGREE = {"python": "Ray refuses nodes with another Python", "ray": "Ray refuses nodes with another version of itself",
               "trireme-llm": "its processes speak one wire"}  # fmt: skip


class JobNodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One node. ``gpus``: GPUs that processes can see, None = nothing tells; ``allotted``: what Slurm granted; ``unseen``: files of the
    first node that are not there; ``skew_s``: this node's clock against the first one's; ``name_s``: how long its own name took to resolve,
    None = it does not; ``taken``: ports of the job that others hold here; ``shm``: bytes of /dev/shm."""

    node: str
    mpi: str
    mpi_fault: str = ""
    gpus: int | None = None
    allotted: int = 0
    versions: dict[str, str]
    unseen: tuple[str, ...] = ()
    skew_s: float = 0.0
    name_s: float | None = 0.0
    taken: tuple[int, ...] = ()
    shm: int = _SHM_BYTES


class PreflightCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; ``hint`` says what to do where ``state`` is not ok."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def look(node: str, allotted: int, ports: Iterable[int], path: str, visible: str | None) -> JobNodeFacts:
    """Look at this node; a few seconds. ``ports``: those that must be free here; ``path``, ``visible``: PATH, CUDA_VISIBLE_DEVICES."""
    try:
        family: str = find_mpi(path).family
        fault = ""
    except EnvironmentFault as error:
        family, fault = "", str(error)
    try:
        seen = gpus(path, visible) if allotted else ()
    except EnvironmentFault:
        seen = ()
    versions = {name: found for name, found in installed_versions().items() if name in _NCCL} | {"python": platform.python_version()}
    for name in ("ray", "trireme-llm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return JobNodeFacts(
        node=node,
        mpi=family,
        mpi_fault=fault,
        gpus=None if seen is None else len(seen),
        allotted=allotted,
        versions=versions,
        name_s=_resolve(socket.gethostname()),
        taken=tuple(port for port in ports if not _free(port)),
        shm=psutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
    )


def _resolve(name: str) -> float | None:
    begun = time.monotonic()
    try:
        socket.gethostbyname(name)
    except OSError:
        return None
    return time.monotonic() - begun


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def judge(facts: Sequence[JobNodeFacts], *, offered: Sequence[str], wants_gpus: bool, wants_ray: bool) -> list[PreflightCheck]:
    """The report. ``facts``: the first node's first; ``offered``: what ``srun --mpi=list`` names; ``wants_gpus``: a model runs on CUDA;
    ``wants_ray``: gangs are launched through it."""
    return [
        _mpi(facts, offered), _gpus(facts, wants_gpus), _files(facts), _ports(facts), _clocks(facts), _versions(facts, wants_ray),
        _nccl(facts), _names(facts), _shared_memory(facts),
    ]  # fmt: skip


def _ok(what: str, found: str) -> PreflightCheck:
    return PreflightCheck(what=what, state="ok", found=found)


def _warn(what: str, found: str, hint: str) -> PreflightCheck:
    return PreflightCheck(what=what, state="warn", found=found, hint=hint)


def _fail(what: str, found: str, hint: str) -> PreflightCheck:
    return PreflightCheck(what=what, state="fail", found=found, hint=hint)


def _where(facts: Sequence[JobNodeFacts], bad: Callable[[JobNodeFacts], object]) -> str:
    return ", ".join(one.node for one in facts if bad(one))


def _mpi(facts: Sequence[JobNodeFacts], offered: Sequence[str]) -> PreflightCheck:
    families = {one.mpi for one in facts}
    slurm = f"srun's own ({', '.join(offered)}) is not used" if offered else "srun --mpi=list names none, and none is needed"
    if missing := _where(facts, lambda one: not one.mpi):
        fault = next(one.mpi_fault for one in facts if not one.mpi)
        found = f"{missing}: {fault}; gangs are started by mpiexec through Ray, {slurm}"
        return _fail("mpi", found, "pip install 'trireme-llm[mpich]' into the Python of the job")
    if len(families) > 1:
        return _fail("mpi", f"nodes differ: {', '.join(f'{one.node} {one.mpi}' for one in facts)}", _ONE_PYTHON)
    return _ok("mpi", f"{families.pop()}, started by mpiexec through Ray; {slurm}")


def _gpus(facts: Sequence[JobNodeFacts], wanted: bool) -> PreflightCheck:
    if wanted and (bare := _where(facts, lambda one: not one.allotted)):
        return _fail("gpus", f"a model has device: cuda, and no GPU was allotted on {bare}", "submit with --gpus-per-node")
    if hidden := _where(facts, lambda one: one.gpus is not None and one.gpus < one.allotted):
        counts = ", ".join(f"{one.node} {one.gpus} of {one.allotted}" for one in facts if one.gpus is not None)
        found = f"fewer are seen than were allotted: {counts}"
        return _fail("gpus", found, f"look at nvidia-smi on {hidden}; a container needs the GPU hook")
    total = sum(one.allotted for one in facts)
    if blind := _where(facts, lambda one: one.allotted and one.gpus is None):
        return _warn("gpus", f"{total} allotted; nothing on {blind} tells which are seen", "install nvidia-smi there")
    return _ok("gpus", f"{total} allotted, all seen" if total else "none allotted, none wanted")


def _files(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    if blind := _where(facts, lambda one: one.unseen):
        missing = next(one.unseen for one in facts if one.unseen)
        found = f"{blind}: {', '.join(missing)} is not seen by every node"
        return _fail("files", found, "--job-dir and cache_dir must be on a file system that all nodes share")
    return _ok("files", "every node sees what another one wrote")


def _ports(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    if taken := [f"{one.node} {port}" for one in facts for port in one.taken]:
        return _fail("ports", f"taken: {', '.join(taken)}", "submit again: another job id has other ports")
    return _ok("ports", "the job's own are free")


def _clocks(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    worst = max(facts, key=lambda one: abs(one.skew_s))
    off = abs(worst.skew_s)
    if off <= SKEW_TOLD_S:
        return _ok("clocks", f"within {off:.1f} s")
    return (_fail if off > SKEW_REFUSED_S else _warn)("clocks", f"{worst.node} is off by {worst.skew_s:+.1f} s", "run NTP on the nodes")


def _versions(facts: Sequence[JobNodeFacts], wants_ray: bool) -> PreflightCheck:
    wanted = {name: why for name, why in _MUST_AGREE.items() if wants_ray or name != "ray"}
    for name, why in wanted.items():
        found = {one.versions.get(name, "missing") for one in facts}
        if len(found) > 1 or "missing" in found:
            versions = ", ".join(f"{one.node} {one.versions.get(name, 'missing')}" for one in facts)
            return _fail("versions", f"{name}: {versions}; {why}", _ONE_PYTHON)
    return _ok("versions", ", ".join(f"{name} {facts[0].versions[name]}" for name in wanted))


def _nccl(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    if not any(one.allotted for one in facts):
        return _ok("nccl", "not needed without GPUs")
    found = {one.node: ", ".join(f"{name} {one.versions[name]}" for name in _NCCL if name in one.versions) for one in facts}
    if len(set(found.values())) > 1:
        return _fail("nccl", f"nodes differ: {', '.join(f'{node} {version or None}' for node, version in found.items())}", _ONE_PYTHON)
    version = found[facts[0].node]
    if not version:
        return _warn("nccl", "no package of it: torch must bring its own", "trireme doctor tries torch")
    return _warn("nccl", version, "install torch for one version of CUDA only") if "," in version else _ok("nccl", version)


def _names(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    if slow := _where(facts, lambda one: one.name_s is None or one.name_s > _SLOW_NAME_S):
        found = f"{slow}: its own host name does not resolve at once, so gangs start seconds later"
        return _warn("names", found, "put it into /etc/hosts there")
    return _ok("names", "every node knows its own name")


def _shared_memory(facts: Sequence[JobNodeFacts]) -> PreflightCheck:
    if small := _where(facts, lambda one: one.shm < _SHM_BYTES):
        return _warn("/dev/shm", f"less than 1 GiB on {small}: NCCL and MPI need it", "give the container a larger one")
    return _ok("/dev/shm", "1 GiB or more")
