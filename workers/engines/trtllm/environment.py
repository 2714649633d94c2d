"""Which environment variables TensorRT-LLM must not see, in its ranks and in its builder.

Pure: environments are arguments. TensorRT-LLM reads its rank and its world from whichever launcher's variables it finds first, Slurm's
before MPI's. So inside a larger allocation, a torchrun or a Ray job it would take another world for its own.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What one launcher or another sets to describe a world; TensorRT-LLM strips the same ones for a child that is to start a world of its own.
WORLD_PREFIXES = (
    "OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "UCX_", "I_MPI_", "HYDRA_", "KMP_", "MPICH_", "MV2_", "CRAY_", "PRTE_", "MPIR_",
    "TLLM_SPAWN_",
)  # fmt: skip
#: Variables of worlds without such a prefix. With RAY_LOCAL_WORLD_SIZE set, TensorRT-LLM takes tp_size for the number of GPUs of a node.
WORLD_NAMES = ("RAY_LOCAL_WORLD_SIZE", "tllm_mpi_size", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
#: A rank that has one of these knows its number without Slurm.
OWN_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")


def for_rank(env: Mapping[str, str]) -> list[str]:
    """Names to take out of a rank's environment before tensorrt_llm is imported. What its own mpiexec set stays: MPI needs it.

    Slurm's variables describe the allocation, unless Slurm itself started the ranks: then nothing else says a rank's number.
    """
    launched_by_mpi = any(name in env for name in OWN_RANK)
    return [
        name for name in env if name in WORLD_NAMES or name.startswith("TLLM_SPAWN_") or (launched_by_mpi and name.startswith("SLURM_"))
    ]


def for_tool(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that starts a world of its own or none at all, such as trtllm-build: ``env`` without any world."""
    return {name: value for name, value in env.items() if name not in WORLD_NAMES and not name.startswith(WORLD_PREFIXES)}
