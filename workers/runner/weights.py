"""Loads weights into a model: one rank's shard as a stream of tensors, and a copy into parameters that fills every parameter and uses every
tensor.

Owns the check that an artifact fits the layout, and the check of a checkpoint's hashes. A shard is in memory once: each tensor is copied
into its parameter and dropped, and the pages of the mapped file are released on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from workers.artifacts.artifact import Artifact, open_source
from workers.artifacts.checkpoint import open_rank, rank_file, read_checkpoint, verify
from workers.artifacts.number_formats import STORAGE, Array
from workers.artifacts.safetensors_file import SafetensorsFile
from workers.artifacts.source import Block, Source, assemble, convert_into
from workers.layout.quant_parts import Format, StoredTensor, stored_tensors
from workers.models.layers import TORCH
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import DType, Parallel, Quant

#: Formats between which a tensor may be converted while it is copied. Other formats need their scales.
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Bytes that are copied to a GPU at a time.
_CHUNK = 64 << 20
#: Standard deviation of random weights, and of random quantized values before scaling.
_DUMMY_SPREAD = 0.02
_SPREADS = {torch.int8: 73.9, torch.uint8: 4.6, torch.float8_e4m3fn: 1.0}


def load_shards(
    artifact: Artifact, parallel: Parallel, rank: int, dtype: DType, quant: Quant | None = None, *, verified: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(TensorRT-LLM checkpoint name, CPU tensor) of everything that ``rank`` holds, in the order of the forward pass.

    Names, shapes and formats are those of :func:`workers.layout.quant_parts.stored_tensors` in ``dtype``. ``quant``: quantize plain weights
    while they are read; None = as the artifact has them. A checkpoint of this very layout is verified by size and sha256 before the first
    tensor, unless ``verified`` is set. Other weights (tp=1 pp=1, Hugging Face, GGUF, checkpoints of TensorRT-LLM's own converters) are
    verified by size and header only, because each rank reads only its slices of them.

    Raises :class:`ArtifactError`: another layout (names both), a file missing, damaged or different from what the manifest says, or
    weights that are quantized otherwise already.
    """
    if not artifact.runs_on(parallel):
        have = artifact.parallel or Parallel()
        raise ArtifactError(
            f"{artifact.path} is for tp={have.tp} pp={have.pp}, the replica has tp={parallel.tp} pp={parallel.pp}",
            "each rank's file holds the slices of its own layout",
            f"run `trireme convert {artifact.path} --tp-size {parallel.tp} --pp-size {parallel.pp}`",
        )
    quant = artifact.quant if quant is None else quant
    wanted = stored_tensors(artifact.model, parallel, rank, dtype=dtype, quant=quant)
    if _has_own_file(artifact, parallel, quant):
        if not verified:
            verify_shard(artifact, parallel, rank, quant)
        return _from_rank_file(open_rank(read_checkpoint(artifact.path), rank), wanted)
    return _from_source(open_source(artifact, quant), wanted)


def _has_own_file(artifact: Artifact, parallel: Parallel, quant: Quant) -> bool:
    """Whether the artifact has a separate file for each rank of this layout."""
    return artifact.own and artifact.parallel == parallel and quant.same_weights(artifact.quant) and not artifact.foreign


def verify_shard(artifact: Artifact, parallel: Parallel, rank: int, quant: Quant) -> None:
    """Compare the file of ``rank``, if there is one, with the manifest. Raises :class:`ArtifactError` if they differ."""
    if _has_own_file(artifact, parallel, quant) and (manifest := read_checkpoint(artifact.path).manifest) is not None:
        verify(artifact.path, manifest, rank_file(rank))


def _from_rank_file(file: SafetensorsFile, wanted: tuple[StoredTensor, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for each in wanted:
        values, form = file.view(each.tensor.name)
        if form != each.format:
            converted = np.empty(each.tensor.shape, STORAGE[each.format])
            convert_into(converted, Block(values, form), each.format)
            values = converted
        yield each.tensor.name, _tensor(values, each.format)
        del values
        file.release()


def _from_source(source: Source, wanted: tuple[StoredTensor, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for each in wanted:
        yield each.tensor.name, _tensor(assemble(source, each.tensor, each.format), each.format)


def _tensor(values: Array, form: Format) -> torch.Tensor:
    """A tensor that shares memory with ``values``, which may be a mapped file: do not write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values.view(np.int16) if form == "bf16" else values).view(TORCH[form])


def fill(params: dict[str, torch.Tensor], stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every tensor of ``stream`` into the parameter of its name: to its device, and unquantized ones to its dtype.

    Raises :class:`ArtifactError` for a tensor without a parameter, a duplicate tensor, a tensor of another shape or quantized format, and a
    parameter without a tensor.
    """
    left = dict(params)
    upload = Upload()
    for name, values in stream:
        target = left.pop(name, None)
        if target is None:
            raise ArtifactError(f"the weights hold {name}", "the model has no such parameter, or it is there twice")
        if target.shape != values.shape:
            raise ArtifactError(f"{name} has shape {list(values.shape)}", f"the model expects {list(target.shape)}")
        if target.dtype != values.dtype and (target.dtype not in _PLAIN or values.dtype not in _PLAIN):
            raise ArtifactError(f"{name} is {values.dtype}", f"the model expects {target.dtype}")
        with torch.no_grad():
            upload.copy(target, values)
    if left:
        raise ArtifactError(f"the weights lack {min(left)}", f"{len(left)} parameters are left unfilled")


def fill_dummy(params: dict[str, torch.Tensor], seed: int) -> None:
    """Fill every parameter with random values of a plausible scale, and norms with ones: for measurements of speed."""
    for name, target in params.items():
        generator = torch.Generator(target.device).manual_seed(seed)
        if "layernorm" in name or "ln_f" in name:
            target.fill_(1.0)
        elif name.endswith((".per_channel_scale", ".weights_scaling_factor")):
            weight = params[name.rpartition(".")[0] + ".weight"]
            target.fill_(_DUMMY_SPREAD / _SPREADS[weight.dtype])
        elif name.endswith(".zero"):
            target.zero_()
        elif target.dtype in (torch.int8, torch.uint8):
            target.random_(generator=generator)
        elif target.dtype == torch.float8_e4m3fn:
            target.copy_(torch.randn(target.shape, device=target.device, generator=generator))
        else:
            target.normal_(0.0, _DUMMY_SPREAD, generator=generator)


class Upload:
    """Copies host tensors into parameters. Copies to a GPU go through two pinned buffers: the host fills one while the other is being
    copied, so the copy does not wait for page faults of the file."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._next = 0

    def copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Copy ``values`` on the host into ``target`` of the same shape, converting where the dtypes differ."""
        if target.device.type != "cuda" or target.dtype != values.dtype or not (target.is_contiguous() and values.is_contiguous()):
            target.copy_(values)
            return
        if not self._buffers:
            self._buffers = [(torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True), _event()) for _ in range(2)]
        target_bytes, source_bytes = target.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8)
        for start in range(0, len(source_bytes), _CHUNK):
            buffer, free = self._buffers[self._next]
            self._next ^= 1
            free.synchronize()
            part = source_bytes[start : start + _CHUNK]
            buffer[: len(part)].copy_(part)
            target_bytes[start : start + len(part)].copy_(buffer[: len(part)], non_blocking=True)
            free.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
