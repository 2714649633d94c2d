"""Weights into a model: one rank's shards as a stream, and a filler that leaves nothing unread and nothing unfilled.

Owns the check that an artifact fits a layout, and of a checkpoint's hashes, before memory is taken. A shard is in memory once: each tensor
is copied into its place and dropped, and pages of the mapped file are given back as it goes.
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

#: Formats between which a tensor may be converted while it is copied; the others are bits that mean something only with their scales.
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Bytes that travel to a GPU at a time.
_CHUNK = 64 << 20
#: Standard deviation of random weights, and of what their quantized integers stand for before scaling.
_DUMMY_SPREAD = 0.02
_SPREADS = {torch.int8: 73.9, torch.uint8: 4.6, torch.float8_e4m3fn: 1.0}


def load_shards(
    artifact: Artifact, parallel: Parallel, rank: int, dtype: DType, quant: Quant | None = None, *, proven: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(TensorRT-LLM checkpoint name, CPU tensor) of everything that ``rank`` holds, in the order of the forward pass.

    Names, shapes and formats are those of :func:`workers.layout.quant_parts.stored_tensors` in ``dtype``. ``quant``: quantize plain weights
    while they are read; None = as the artifact has them. A checkpoint of this very layout is verified by size and sha256 here, before the
    first tensor, unless it is ``proven`` elsewhere; whole weights (tp=1 pp=1, Hugging Face, GGUF) are verified by size and header, since
    each rank reads only its slices of them.

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
        if not proven:
            prove_shard(artifact, parallel, rank, quant)
        return _own(open_rank(read_checkpoint(artifact.path), rank), wanted)
    return _sliced(open_source(artifact, quant), wanted)


def _has_own_file(artifact: Artifact, parallel: Parallel, quant: Quant) -> bool:
    return artifact.parallel == parallel and quant.same_weights(artifact.quant) and not artifact.foreign


def prove_shard(artifact: Artifact, parallel: Parallel, rank: int, quant: Quant) -> None:
    """Compare the file that ``rank`` loads whole, if there is one, with the manifest. Raises :class:`ArtifactError`."""
    if _has_own_file(artifact, parallel, quant):
        verify(artifact.path, read_checkpoint(artifact.path).manifest, rank_file(rank))


def _own(file: SafetensorsFile, wanted: tuple[StoredTensor, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for each in wanted:
        values, form = file.view(each.tensor.name)
        if form != each.format:
            converted = np.empty(each.tensor.shape, STORAGE[each.format])
            convert_into(converted, Block(values, form), each.format)
            values = converted
        yield each.tensor.name, _tensor(values, each.format)
        del values
        file.release()


def _sliced(source: Source, wanted: tuple[StoredTensor, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for each in wanted:
        yield each.tensor.name, _tensor(assemble(source, each.tensor, each.format), each.format)


def _tensor(values: Array, form: Format) -> torch.Tensor:
    """Shares memory with ``values``, which may be a mapped file: to be read only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values.view(np.int16) if form == "bf16" else values).view(TORCH[form])


def fill(params: dict[str, torch.Tensor], stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every tensor of ``stream`` into the parameter of its name, converting plain ones to its dtype, all to its device.

    Raises :class:`ArtifactError` for a tensor without a parameter (or met twice), one of another shape or quantized format, and a
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


def dummy(params: dict[str, torch.Tensor], seed: int) -> None:
    """Fill every parameter with random values of a plausible scale, norms with ones: for measurements of speed."""
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
    """Copies host tensors to where they belong. To a GPU by way of pinned buffers, two at a time: the host fills one while the other
    travels, and nothing waits for the file's pages to be read one by one."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """``target`` [shape] from ``values`` [shape] on the host, converting where they differ in dtype."""
        if target.device.type != "cuda" or target.dtype != values.dtype or not (target.is_contiguous() and values.is_contiguous()):
            target.copy_(values)
            return
        if not self._buffers:
            self._buffers = [(torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True), _event()) for _ in range(2)]
        there, here = target.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8)
        for start in range(0, len(here), _CHUNK):
            buffer, free = self._buffers[self._turn]
            self._turn ^= 1
            free.synchronize()
            part = here[start : start + _CHUNK]
            buffer[: len(part)].copy_(part)
            there[start : start + len(part)].copy_(buffer[: len(part)], non_blocking=True)
            free.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
