"""Weights into a model: one rank's shards as a stream, and a filler that leaves nothing unread and nothing unfilled.

Owns the check that an artifact fits a layout, and of a checkpoint's hashes, before memory is taken. A shard is in memory once: each tensor
is copied into its place and dropped, and pages of the mapped file are given back as it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from workers.artifacts.artifact import Artifact, open_source
from workers.artifacts.checkpoint import open_rank, rank_file, read_checkpoint, verify
from workers.artifacts.numbers import STORAGE, Array
from workers.artifacts.source import Block, Source, assemble, convert_into
from workers.artifacts.tensorfile import TensorFile
from workers.core.shard import ShardTensor, shard_tensors
from workers.errors import ArtifactError
from workers.spec import DType, Parallel

TORCH: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_shards(artifact: Artifact, parallel: Parallel, rank: int, dtype: DType) -> Iterator[tuple[str, torch.Tensor]]:
    """(TensorRT-LLM checkpoint name, CPU tensor in ``dtype``) of everything that ``rank`` holds, in the order of the forward pass.

    Names and shapes are those of :func:`workers.core.shard.shard_tensors`. A checkpoint of this very layout is verified by size and sha256
    here, before the first tensor; whole weights (tp=1 pp=1, Hugging Face, GGUF) are verified by size and header, since each rank reads
    only its slices of them.

    Raises :class:`ArtifactError`: another layout (names both), or a file missing, damaged or different from what the manifest says.
    """
    if not artifact.runs_on(parallel):
        have = artifact.parallel or Parallel()
        raise ArtifactError(
            f"{artifact.path} is for tp={have.tp} pp={have.pp}, the replica has tp={parallel.tp} pp={parallel.pp}",
            "each rank's file holds the slices of its own layout",
            f"run `trireme convert {artifact.path} --tp-size {parallel.tp} --pp-size {parallel.pp}`",
        )
    wanted = shard_tensors(artifact.model, parallel, rank)
    if artifact.parallel == parallel and artifact.quant.quant_algo is None:
        checkpoint = read_checkpoint(artifact.path)
        verify(artifact.path, checkpoint.manifest, rank_file(rank))
        return _own(open_rank(checkpoint, rank), wanted, dtype)
    return _sliced(open_source(artifact), wanted, dtype)


def _own(file: TensorFile, wanted: tuple[ShardTensor, ...], dtype: DType) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in wanted:
        values = np.empty(tensor.shape, STORAGE[dtype])
        convert_into(values, Block(*file.view(tensor.name)), dtype)
        file.release()
        yield tensor.name, _tensor(values, dtype)


def _sliced(source: Source, wanted: tuple[ShardTensor, ...], dtype: DType) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in wanted:
        yield tensor.name, _tensor(assemble(source, tensor, dtype), dtype)


def _tensor(values: Array, dtype: DType) -> torch.Tensor:
    """Shares memory with ``values``."""
    return torch.from_numpy(values.view(np.int16) if dtype == "bf16" else values).view(TORCH[dtype])


def fill(params: dict[str, torch.Tensor], stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every tensor of ``stream`` into the parameter of its name, converting to its dtype and device.

    Raises :class:`ArtifactError` for a tensor without a parameter (or met twice), one of another shape, and a parameter without a tensor.
    """
    left = dict(params)
    for name, values in stream:
        target = left.pop(name, None)
        if target is None:
            raise ArtifactError(f"the weights hold {name}", "the model has no such parameter, or it is there twice")
        if target.shape != values.shape:
            raise ArtifactError(f"{name} has shape {list(values.shape)}", f"the model expects {list(target.shape)}")
        with torch.no_grad():
            target.copy_(values)
    if left:
        raise ArtifactError(f"the weights lack {min(left)}", f"{len(left)} parameters are left unfilled")
