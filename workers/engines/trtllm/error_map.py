"""Translates the texts of TensorRT-LLM's exceptions into errors that say why, and what to do.

Owns the patterns, which come from texts that users report. A text that matches none of them is passed on unchanged.
"""

from __future__ import annotations

import re

from workers.protocol.errors import ArtifactError, EngineFault, EnvironmentFault, TriremeError

_LONGEST = 300
_VERSION = re.compile(r"stdVersionRead|kSERIALIZATION_VERSION|[Vv]ersion tag does not match|incompatible (TensorRT )?version")
_DEVICE = re.compile(r"incompatible device|expecting compute")
_DESERIALIZE = re.compile(r"[Ff]ailed to deserialize|[Dd]eserializ\w+ failed")
_WORLD = re.compile(r"mpiSize|world.?size|WorldConfig", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|[Ff]ailed to allocate|insufficient memory|CUDA_ERROR_OUT_OF_MEMORY"
)


def explain(error: BaseException, rank: int) -> TriremeError:
    """The error of ``rank`` while it loads or starts. Raises nothing."""
    if isinstance(error, TriremeError):
        return error
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:_LONGEST]
    if _MEMORY.search(text):
        what = f"rank {rank} has not enough GPU memory for weights and KV cache"
        return EnvironmentFault(
            what, text, "lower trtllm.kv_cache.free_gpu_memory_fraction or set kv_bytes; see that no other process holds memory"
        )
    if _VERSION.search(text):
        return ArtifactError(
            f"rank {rank} cannot read its engine: another TensorRT version built it", text, "build it again with `trireme build`"
        )
    if _DEVICE.search(text):
        return ArtifactError(f"rank {rank} cannot run its engine: it was built for another GPU", text, "build it again on this kind of GPU")
    if _DESERIALIZE.search(text):
        hint = "build it again with this TensorRT-LLM and on this kind of GPU"
        return ArtifactError(f"rank {rank} cannot read its engine", text, hint)
    if _WORLD.search(text):
        return ArtifactError(
            f"rank {rank}: the engine was built for another number of ranks", text, "use the tp and pp that it was built for"
        )
    return EngineFault(f"rank {rank} could not start TensorRT-LLM", text, "the rank's log has the stack trace")
