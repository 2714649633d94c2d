"""Conversion of any model file to a TensorRT-LLM checkpoint of any tp × pp: rank by rank, one tensor in memory at a time.

Owns the order of writing: weights, tokenizer, config, manifest, rename. Changes nothing at the target until everything is on the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec

from workers.artifacts.artifact import Artifact, open_artifact, open_source
from workers.artifacts.aside import ELSEWHERE, replacing
from workers.artifacts.checkpoint import (
    CONFIG,
    FORMAT,
    MANIFEST,
    Manifest,
    Trireme,
    config_of,
    describe,
    rank_file,
    read_checkpoint,
    verify_all,
)
from workers.artifacts.gguf import GgufFile
from workers.artifacts.hf import TOKENIZER_FILES
from workers.artifacts.source import Source, assemble
from workers.artifacts.tensorfile import FileRecord, TensorWriter, write_file
from workers.artifacts.vocabulary import read_vocabulary, tokenizer_files
from workers.core.shard import shard_tensors, trtllm_refusal
from workers.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.spec import DTYPE_BYTES, DType, Parallel

#: (phase, done, total), in bytes; called from the converting thread.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """The Progress of a caller that draws none."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    parallel: Parallel,
    dtype: DType | None = None,
    for_trtllm: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write ``source`` (checkpoint of any layout, Hugging Face folder, GGUF) as a checkpoint for ``parallel``; returns ``target``.

    ``dtype`` None keeps the source's. ``for_trtllm``: only layouts that TensorRT-LLM accepts, and everything that its builder needs. A
    checkpoint at ``target`` is replaced at the end; a folder of anything else is refused.

    Raises:
        ConfigError: the model cannot be split this way.
        ArtifactError: the source is damaged or not supported, or the target is not a checkpoint.
        EnvironmentFault: the disk is full or cannot be written.
    """
    target = Path(target)
    artifact = open_artifact(source)
    refuse_layout(artifact, parallel, for_trtllm)
    facts = describe(artifact.model, parallel, dtype or artifact.dtype, artifact.eos_ids, for_trtllm=for_trtllm)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ArtifactError(f"{target} exists and is not a checkpoint", "nothing there is overwritten", "choose another folder")
    tokenizer = _tokenizer(artifact)
    if artifact.kind == "checkpoint":
        # The new manifest vouches for what is read here: a damaged shard must not come out with a hash that fits.
        verify_all(read_checkpoint(artifact.path))
    with replacing(target) as aside:
        total = sum(checkpoint_bytes(facts, rank) for rank in range(parallel.world))
        free = shutil.disk_usage(aside).free
        if free < total:
            raise EnvironmentFault(f"not enough room for {target}", f"needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", ELSEWHERE)
        files = _write_ranks(open_source(artifact), facts, aside, total, progress)
        files |= {name: write_file(aside / name, data) for name, data in tokenizer.items()}
        config = config_of(facts) | {"trireme": msgspec.to_builtins(facts)}
        files[CONFIG] = write_file(aside / CONFIG, json.dumps(config, indent=2).encode())
        manifest = msgspec.json.format(msgspec.json.encode(Manifest(format=FORMAT, files=files)), indent=2)
        write_file(aside / MANIFEST, manifest)
    return target


def refuse_layout(artifact: Artifact, parallel: Parallel, for_trtllm: bool) -> None:
    """Raises :class:`ConfigError` when the model cannot be split this way by the portable engine, or by TensorRT-LLM where asked for."""
    parallel.check(artifact.model)
    refusal = trtllm_refusal(artifact.model, parallel) if for_trtllm else None
    if refusal is not None:
        raise ConfigError(f"{refusal[0]} (model {artifact.path.stem})", "", refusal[1])


def checkpoint_bytes(facts: Trireme, rank: int) -> int:
    """Bytes of weights that ``rank``'s file holds."""
    width = DTYPE_BYTES[facts.dtype]
    return width * sum(t.elements for t in shard_tensors(facts.model, facts.parallel, rank, own_head=facts.own_head))


def _write_ranks(source: Source, facts: Trireme, folder: Path, total: int, progress: Progress) -> dict[str, FileRecord]:
    records, done = {}, 0
    progress("convert", 0, total)
    for rank in range(facts.parallel.world):
        tensors = shard_tensors(facts.model, facts.parallel, rank, own_head=facts.own_head)
        metadata = {"format": "pt", "rank": str(rank)}
        name = rank_file(rank)
        with TensorWriter(folder / name, {t.name: t.shape for t in tensors}, facts.dtype, metadata) as writer:
            for tensor in tensors:
                values = assemble(source, tensor, facts.dtype)
                writer.write(tensor.name, values)
                done += values.nbytes
                progress("convert", done, total)
            records[name] = writer.finish()
    return records


def _tokenizer(artifact: Artifact) -> dict[str, bytes]:
    if artifact.kind == "gguf":
        return tokenizer_files(artifact.path, read_vocabulary(artifact.path, GgufFile(artifact.path).metadata))
    paths = [artifact.path / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
