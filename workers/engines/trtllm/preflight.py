"""Pre-flight: checks before any rank starts whether a replica's engine can run on its nodes.

TensorRT-LLM detects a wrong version, GPU or world only after MPI has started on every node, its messages name neither, and a rank that
fails then may leave the others waiting for ever. Every check here is a simple comparison; the facts come from ``engine_dir`` and
``node_probe``. Must never import tensorrt_llm, nor start anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from workers.engines.trtllm.engine_dir import EngineDir
from workers.engines.trtllm.node_probe import NodeFacts
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault, TriremeError
from workers.protocol.specs import EngineSpec, Parallel, ReplicaSpec

#: GPU memory that a rank needs in addition to its engine: contexts of CUDA and NCCL, workspaces, some KV cache. Bytes.
RESERVE = 1 << 30
GIB = 1 << 30
INSTALL = "pip install tensorrt_llm from NVIDIA's index, or run in the image of deploy/docker"


class GangPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """The placement of a gang: ``ranks[i]`` consecutive ranks on node i; ``node`` is the node of this check. ``mpi``: family of its
    mpiexec."""

    ranks: tuple[int, ...]
    node: int = 0
    mpi: str = ""

    def here(self) -> range:
        """The ranks of the node of this check."""
        start = sum(self.ranks[: self.node])
        return range(start, start + self.ranks[self.node])


def check_rank(engine: EngineDir, spec: ReplicaSpec, *, installed: str) -> None:
    """Check the facts that any rank knows. ``installed``: version of TensorRT-LLM, empty without it.

    Raises ArtifactError, ConfigError or EnvironmentFault, on every rank the same.
    """
    for fault in (*package_faults(installed), *engine_faults(engine, spec.parallel, spec.engine, installed)):
        raise fault


def faults(
    engine: EngineDir | None, parallel: Parallel, limits: EngineSpec | None, facts: NodeFacts, placement: GangPlacement | None
) -> list[TriremeError]:
    """All reasons against a launch, the root causes first. ``engine`` None: a model that TensorRT-LLM loads without a build.

    ``limits``: the replica's limits; None = those of the engine. ``placement`` None: check only the node.
    """
    found = list(package_faults(facts.installed))
    if engine is not None:
        found += engine_faults(engine, parallel, limits, facts.installed)
    found += library_faults(facts, placement)
    if facts.gpus is not None:
        found += gpu_faults(engine, facts, placement)
    return found


def package_faults(installed: str) -> Iterator[TriremeError]:
    if not installed:
        yield EnvironmentFault("TensorRT-LLM is not installed", "this Python has no distribution tensorrt_llm", INSTALL)


def engine_faults(engine: EngineDir, parallel: Parallel, limits: EngineSpec | None, installed: str) -> Iterator[TriremeError]:
    """Compare an engine folder with the installed packages and the replica's settings."""
    path, built = engine.path, engine.parallel
    if installed and engine.version != installed:
        why = f"{engine.version} built it and {installed} is installed; an engine loads only in the version that built it"
        hint = f"run `trireme build` again with {installed}, or install tensorrt_llm=={engine.version}"
        yield ArtifactError(f"{path} is for another TensorRT-LLM", why, hint)
    if built != parallel:
        why = f"it was built for tp={built.tp} pp={built.pp}, the replica has tp={parallel.tp} pp={parallel.pp}"
        hint = f"set tp_size: {built.tp} and pp_size: {built.pp}, or convert and build for the other layout"
        yield ConfigError(f"{path} has another layout than the replica", why, hint)
    if not engine.paged_kv_cache:
        yield ArtifactError(f"{path} has no paged KV cache", "without one it cannot batch in flight", "build it with --kv-cache-type paged")
    for name in ("max_batch_size", "max_num_tokens", "max_seq_len") if limits is not None else ():
        asked, most = getattr(limits, name), getattr(engine, name)
        if asked > most:
            why = f"its engine was built for {name} {most}"
            yield ConfigError(f"{name}: {asked} is more than {path.name} can do", why, f"set {name}: {most} or less, or build it larger")


def library_faults(facts: NodeFacts, placement: GangPlacement | None) -> Iterator[TriremeError]:
    """Check that there is one NCCL and one MPI, and that they are those of TensorRT-LLM."""
    nccl = [name for name in facts.versions if name.startswith("nvidia-nccl")]
    if len(nccl) > 1:
        why = "they put the same file in the same place, and a process must never hold two"
        wanted = facts.nccl[0] if len(facts.nccl) == 1 else nccl[-1]
        yield EnvironmentFault(f"{' and '.join(nccl)} are both installed", why, f"make a fresh environment with {wanted} alone")
    elif nccl and facts.nccl and nccl[0] not in facts.nccl:
        why = f"tensorrt_llm {facts.installed} asks for {' or '.join(facts.nccl)}"
        yield EnvironmentFault(f"{nccl[0]} is the wrong NCCL", why, f"pip uninstall {nccl[0]} and pip install {facts.nccl[0]}")
    if placement is not None and facts.mpi and placement.mpi and facts.mpi != placement.mpi:
        why = f"TensorRT-LLM is linked against {facts.mpi}, the launcher's mpiexec is {placement.mpi}'s: the ranks would not meet"
        yield EnvironmentFault(
            "two MPI libraries would meet in one rank", why, f"install trireme-llm[{facts.mpi}] in place of [{placement.mpi}]"
        )


def gpu_faults(engine: EngineDir | None, facts: NodeFacts, placement: GangPlacement | None) -> Iterator[TriremeError]:
    """Compare the GPUs of this node with the ranks on it, and with the GPU of the engine's build."""
    gpus = facts.gpus or ()
    ranks = placement.here() if placement is not None else range(0)
    if placement is not None and len(set(placement.ranks)) > 1:
        why = f"{', '.join(map(str, placement.ranks))} ranks go to its nodes; TensorRT-LLM numbers GPUs as if all nodes had the same number"
        yield ConfigError(
            "the replica is distributed unevenly to its nodes", why, "set spread: true, or choose a layout that fits the nodes"
        )
    if len(gpus) < len(ranks):
        why = f"{len(ranks)} ranks go there, each needs one"
        yield EnvironmentFault(
            f"this node has {len(gpus)} usable GPUs", why, "free the others, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
    used = gpus[: len(ranks)] if placement is not None else gpus
    built = engine.record.gpu if engine is not None and engine.record is not None else None
    for gpu in used if built is not None else ():
        if built is not None and gpu.capability != built.capability:
            why = f"its engines were built on {built.name}, compute capability {built.capability}"
            what = f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability}"
            yield ArtifactError(what, why, "run `trireme build` again on this node's GPU, or use nodes like the builder's")
            break
    for rank, gpu in zip(ranks, used, strict=False) if engine is not None else ():
        if engine is not None and rank < engine.world and gpu.free < engine.engine_bytes(rank) + RESERVE:
            need = (engine.engine_bytes(rank) + RESERVE) / GIB
            why = f"rank {rank} needs {need:.1f} GiB, {gpu.free / GIB:.1f} of {gpu.memory / GIB:.1f} are free"
            yield EnvironmentFault(f"GPU {gpu.index} has too little free memory", why, "end what holds it: nvidia-smi names the processes")


def notes(engine: EngineDir | None, facts: NodeFacts) -> list[str]:
    """The checks that were not possible, and why: without a note they would seem to have passed."""
    found = []
    if facts.gpus is None:
        found.append("GPUs were not looked at: there is no nvidia-smi on PATH, or CUDA_VISIBLE_DEVICES names slices of them")
    if engine is not None and engine.record is None:
        found.append(f"{engine.path} has no record of its build: neither its GPU nor its hashes can be compared")
    if facts.installed and not facts.mpi:
        found.append("the MPI that tensorrt_llm is linked against is not known: its files name none")
    return found
