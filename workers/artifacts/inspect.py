"""Describes a model file, and whether it runs on a layout, before anything is started.

Reads headers only, except for ``verify_files``. Decides nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from workers.artifacts.artifact import Artifact, Kind, open_artifact, open_source
from workers.artifacts.checkpoint import open_rank, read_checkpoint, verify_all
from workers.artifacts.convert import refuse_format
from workers.artifacts.hf_quantization import MODELOPT_METHOD
from workers.layout.quant_parts import stored_tensors
from workers.layout.sharding import active_parameters, parameters, trtllm_refusal
from workers.protocol.errors import ConfigError
from workers.protocol.specs import DType, ModelSpec, Parallel, Quant


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a model file holds. ``parallel``: layout of a checkpoint, None for whole models. ``active_parameters``: those that compute one
    token, fewer where a layer has experts. ``quant``: format of linear layers' weights; ``dtype``: format of the others; ``dequantized``:
    the form of another tool from which both are made while loading, else empty. ``rank_bytes``: bytes of each rank's weights in these
    formats, for the layout asked about (by default the stored one, else one rank).

    ``runs``: whether ranks of that layout can load it as it is; ``reason``: why not, and what to do. ``trtllm``: why TensorRT-LLM would
    refuse the layout, empty when it would not. ``verified``: whether every file's hash was compared.
    """

    path: Path
    kind: Kind
    model: ModelSpec
    parameters: int
    active_parameters: int
    dtype: DType
    quant: Quant
    dequantized: str
    parallel: Parallel | None
    rank_bytes: tuple[int, ...]
    eos_ids: tuple[int, ...]
    tokenizer: bool
    runs: bool
    reason: str = ""
    trtllm: str = ""
    verified: bool = False


def inspect_path(path: str | Path, parallel: Parallel | None = None, *, verify_files: bool = False) -> Inspection:
    """Describe the model at ``path``, for the layout ``parallel``.

    Compares the headers of all files with the model; ``verify_files`` also compares the sha256 of every file of a checkpoint with the
    manifest. Raises :class:`~workers.protocol.errors.ArtifactError` when the path holds no model, or a damaged one.
    """
    artifact = open_artifact(path)
    layout = parallel or artifact.parallel or Parallel()
    reason = _why_not(artifact, layout)
    impossible = _impossible(artifact, layout)
    if verify_files and artifact.kind == "checkpoint":
        verify_all(read_checkpoint(artifact.path))
    _check_headers(artifact)
    return Inspection(
        path=artifact.path,
        kind=artifact.kind,
        model=artifact.model,
        parameters=parameters(artifact.model),
        active_parameters=active_parameters(artifact.model),
        dtype=artifact.dtype,
        quant=artifact.quant,
        dequantized=artifact.dequantized,
        parallel=artifact.parallel,
        rank_bytes=() if impossible else _rank_bytes(artifact, layout),
        eos_ids=artifact.eos_ids,
        tokenizer=artifact.tokenizer_dir is not None or artifact.kind == "gguf",
        runs=not reason,
        reason=reason,
        trtllm="" if impossible else _why_not_trtllm(artifact, layout),
        verified=verify_files and artifact.own,
    )


def _rank_bytes(artifact: Artifact, layout: Parallel) -> tuple[int, ...]:
    ranks = [stored_tensors(artifact.model, layout, rank, dtype=artifact.dtype, quant=artifact.quant) for rank in range(layout.world)]
    return tuple(sum(tensor.nbytes for tensor in tensors) for tensors in ranks)


def _impossible(artifact: Artifact, layout: Parallel) -> str:
    try:
        layout.check(artifact.model)
        _rank_bytes(artifact, layout)
    except ConfigError as error:
        return str(error)
    return ""


def _why_not_trtllm(artifact: Artifact, layout: Parallel) -> str:
    if refusal := trtllm_refusal(artifact.model, layout):
        return refusal[0]
    try:
        refuse_format(artifact.quant, for_trtllm=True)
    except ConfigError as error:
        return error.why
    if artifact.scheme is not None and artifact.scheme.method != MODELOPT_METHOD:
        return f"does not get weights of {artifact.scheme.method}"
    return ""


def _why_not(artifact: Artifact, layout: Parallel) -> str:
    if impossible := _impossible(artifact, layout):
        return impossible
    if artifact.foreign:
        return f"quantized with {artifact.quant.quant_algo}: only TensorRT-LLM reads these weights"
    if artifact.parallel is None or artifact.runs_on(layout):
        return ""
    have = artifact.parallel
    return f"stored for tp={have.tp} pp={have.pp}, asked for tp={layout.tp} pp={layout.pp}: convert it to that layout"


def _check_headers(artifact: Artifact) -> None:
    if artifact.foreign:
        return
    if artifact.kind != "checkpoint":
        open_source(artifact)
        return
    checkpoint = read_checkpoint(artifact.path)
    for rank in range(checkpoint.facts.parallel.world):
        open_rank(checkpoint, rank)
