"""Conversion of any model file to a TensorRT-LLM checkpoint of any tp × pp: rank by rank, one tensor in memory at a time.

Owns the order of writing: weights, tokenizer, config, manifest, rename. The target does not change before everything is on the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec

from workers.artifacts.artifact import Artifact, open_artifact, open_source
from workers.artifacts.atomic_folder import MAKE_ROOM, replacing
from workers.artifacts.checkpoint import (
    CONFIG,
    FORMAT,
    MANIFEST,
    CheckpointFacts,
    Manifest,
    config_of,
    describe,
    rank_file,
    read_checkpoint,
    stored,
    verify_all,
)
from workers.artifacts.gguf import GgufFile
from workers.artifacts.gguf_tokenizer import read_vocabulary, tokenizer_files
from workers.artifacts.hf import tokenizer_paths
from workers.artifacts.safetensors_file import FileRecord, SafetensorsWriter, write_file
from workers.artifacts.source import Source, assemble
from workers.layout.sharding import trtllm_refusal
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import DType, Parallel, Quant

#: (phase, done, total), in bytes; called from the converting thread.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    parallel: Parallel,
    dtype: DType | None = None,
    quant: Quant | None = None,
    fp8_kv_cache: bool = False,
    for_trtllm: bool = False,
    tokenizer: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Write ``source`` (checkpoint of any layout, Hugging Face folder, GGUF) as a checkpoint for ``parallel``; returns ``target``.

    ``dtype``, ``quant`` None keep the source's. ``fp8_kv_cache``: replicas on a GPU keep keys and values in FP8. ``for_trtllm``: only
    layouts and formats that TensorRT-LLM accepts, and everything that its builder needs. ``tokenizer``: a folder with the tokenizer's
    files; None = they are the source's. A checkpoint at ``target`` is replaced at the
    end; a folder that is no checkpoint is refused.

    Raises:
        ConfigError: the model cannot be split this way, or a quantization group would be cut between two ranks.
        ArtifactError: the source is damaged or not supported, or the target is not a checkpoint.
        EnvironmentFault: the disk is full or cannot be written.
    """
    target = Path(target)
    artifact = open_artifact(source)
    quant = artifact.quant if quant is None else quant
    if fp8_kv_cache:
        quant = msgspec.structs.replace(quant, kv_cache_quant_algo="FP8")
    refuse_layout(artifact, parallel, for_trtllm)
    refuse_format(quant, for_trtllm)
    facts = describe(artifact.model, parallel, dtype or artifact.dtype, artifact.eos_ids, for_trtllm=for_trtllm)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ArtifactError(f"{target} exists and is not a checkpoint", "nothing there is overwritten", "choose another folder")
    files_of_tokenizer = _tokenizer(artifact) if tokenizer is None else _read_all(tokenizer)
    if artifact.kind == "checkpoint":
        # The new manifest gets hashes of the data read here, so a damaged shard must not get a valid hash.
        verify_all(read_checkpoint(artifact.path))
    total = sum(tensor.nbytes for rank in range(parallel.world) for tensor in stored(facts, quant, rank))
    with replacing(target) as aside:
        free = shutil.disk_usage(aside).free
        if free < total:
            raise EnvironmentFault(f"not enough room for {target}", f"needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", MAKE_ROOM)
        files = _write_ranks(open_source(artifact, quant), facts, quant, aside, total, progress)
        files |= {name: write_file(aside / name, data) for name, data in files_of_tokenizer.items()}
        config = config_of(facts, quant) | {"trireme": msgspec.to_builtins(facts)}
        files[CONFIG] = write_file(aside / CONFIG, json.dumps(config, indent=2).encode())
        manifest = msgspec.json.format(msgspec.json.encode(Manifest(format=FORMAT, files=files)), indent=2)
        write_file(aside / MANIFEST, manifest)
    return target


def refuse_layout(artifact: Artifact, parallel: Parallel, for_trtllm: bool) -> None:
    """Raises :class:`ConfigError` when the portable engine cannot split the model this way, or, with ``for_trtllm``, TensorRT-LLM
    cannot."""
    parallel.check(artifact.model)
    refusal = trtllm_refusal(artifact.model, parallel) if for_trtllm else None
    if refusal is not None:
        raise ConfigError(f"{refusal[0]} (model {artifact.path.stem})", "", refusal[1])


def refuse_format(quant: Quant, for_trtllm: bool) -> None:
    """With ``for_trtllm``, raises :class:`ConfigError` for a format that TensorRT-LLM stores in another arrangement."""
    if for_trtllm and quant.kv_cache_quant_algo is not None:
        raise ConfigError(
            "--for-trtllm does not go with an FP8 KV cache", "TensorRT-LLM wants calibrated scales for it", "let its tools quantize"
        )
    if for_trtllm and quant.weights in ("int8", "int4"):
        raise ConfigError(
            f"--for-trtllm does not go with {quant.quant_algo} weights",
            "TensorRT-LLM interleaves its integers for one GPU generation, with its own kernels' order",
            "convert to bf16 or fp16 and let its tools quantize",
        )


def _write_ranks(
    source: Source, facts: CheckpointFacts, quant: Quant, folder: Path, total: int, progress: Progress
) -> dict[str, FileRecord]:
    records, done = {}, 0
    progress("convert", 0, total)
    for rank in range(facts.parallel.world):
        wanted = stored(facts, quant, rank)
        name = rank_file(rank)
        announced = {each.tensor.name: (each.tensor.shape, each.format) for each in wanted}
        with SafetensorsWriter(folder / name, announced, {"format": "pt", "rank": str(rank)}) as writer:
            for each in wanted:
                values = assemble(source, each.tensor, each.format)
                writer.write(each.tensor.name, values)
                done += values.nbytes
                progress("convert", done, total)
            records[name] = writer.finish()
    return records


def _tokenizer(artifact: Artifact) -> dict[str, bytes]:
    if artifact.kind == "gguf":
        return tokenizer_files(artifact.path, read_vocabulary(artifact.path, GgufFile(artifact.path).metadata))
    return _read_all(artifact.path)


def _read_all(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in tokenizer_paths(folder).items()}
