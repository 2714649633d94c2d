"""Environment variables that TensorRT-LLM must not see, in its ranks and in its builder.

Pure: environments are arguments. TensorRT-LLM reads its rank and its world from the first launcher's variables that it finds, Slurm's
before MPI's. So inside a larger allocation, a torchrun or a Ray job it would use a wrong world.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Prefixes of variables with which launchers describe a world; TensorRT-LLM removes the same ones for a child that starts its own world.
WORLD_PREFIXES = (
    "OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "UCX_", "I_MPI_", "HYDRA_", "KMP_", "MPICH_", "MV2_", "CRAY_", "PRTE_", "MPIR_",
    "TLLM_SPAWN_",
)  # fmt: skip
#: Variables of worlds without such a prefix. With RAY_LOCAL_WORLD_SIZE set, TensorRT-LLM uses tp_size as the number of GPUs of a node.
WORLD_NAMES = ("RAY_LOCAL_WORLD_SIZE", "tllm_mpi_size", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
#: A rank with one of these knows its number without Slurm.
OWN_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")


def for_rank(env: Mapping[str, str]) -> list[str]:
    """Names to remove from a rank's environment before tensorrt_llm is imported. Variables of its own mpiexec stay, because MPI needs them.

    Slurm's variables describe the allocation, except if Slurm itself started the ranks: then only they contain a rank's number.
    """
    launched_by_mpi = any(name in env for name in OWN_RANK)
    return [
        name for name in env if name in WORLD_NAMES or name.startswith("TLLM_SPAWN_") or (launched_by_mpi and name.startswith("SLURM_"))
    ]


def for_tool(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that starts its own world or none, such as trtllm-build: ``env`` without variables of any world."""
    return {name: value for name, value in env.items() if name not in WORLD_NAMES and not name.startswith(WORLD_PREFIXES)}
