"""Ready runners over a Hugging Face folder: an independent, short loader that cuts by :mod:`workers.layout.sharding`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from workers.distributed.group import Group, Solo
from workers.kernels import Kernels
from workers.layout.quant_parts import stored_tensors
from workers.layout.sharding import shard_of, shard_tensors, whole_tensors
from workers.models.decoder import DecoderStage
from workers.protocol.specs import EngineSpec, ModelSpec, Parallel, Quant
from workers.runner.cpu_runner import CpuRunner
from workers.runner.kv_cache import KvCache

CPU = torch.device("cpu")
# As in every rank: with more threads a product's rows are shared out, and their bits depend on their place.
torch.set_num_threads(1)


def whole_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def make_stage(
    model: ModelSpec,
    weights: dict[str, torch.Tensor],
    parallel: Parallel | None = None,
    rank: int = 0,
    *,
    tensor: Group | None = None,
    dtype: torch.dtype = torch.float32,
    positions: int = 512,
    fixed: bool = False,
    device: torch.device = CPU,
    kernels: Kernels[Any] | None = None,
) -> DecoderStage:
    parallel = parallel or Parallel()
    shard = shard_of(model, parallel, rank)
    stage = DecoderStage(model, parallel, shard, tensor or Solo(), dtype=dtype, device=device, positions=positions, kernels=kernels)
    parameters = stage.parameters()
    for wanted in shard_tensors(model, parallel, rank):
        pieces = [weights[p.tensor.name].narrow(p.tensor.axis, p.span.start, p.span.size) for p in wanted.pieces]
        filled = torch.zeros(wanted.shape)
        whole = torch.cat(pieces, wanted.pieces[0].tensor.axis)
        filled[tuple(slice(size) for size in whole.shape)] = whole
        parameters.pop(wanted.name).copy_(filled)
    assert not parameters, f"unfilled: {sorted(parameters)}"
    stage.freeze(fixed_rows=fixed)
    return stage


def make_runner(
    stage: DecoderStage,
    *,
    tensor: Group | None = None,
    pipeline: Group | None = None,
    blocks: int = 64,
    block_size: int = 16,
    slots: int = 64,
    max_seq_len: int = 512,
    eos_ids: tuple[int, ...] = (),
    fixed: bool = False,
) -> CpuRunner:
    cache = KvCache(stage.model, stage.shard, blocks=blocks, block_size=block_size, dtype=stage.dtype, device=stage.device)
    return CpuRunner(
        stage,
        cache,
        pipeline=pipeline or Solo(),
        tensor=tensor or Solo(),
        slots=slots,
        max_seq_len=max_seq_len,
        eos_ids=eos_ids,
        fixed_shape=fixed,
    )


def random_weights(model: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of plausible scale for a shape that no folder has."""
    random = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((random.standard_normal(t.shape) * (0.5 / np.sqrt(t.shape[-1]))).astype(np.float32))
        for name, t in whole_tensors(model).items()
    }


def weight_bytes(model: ModelSpec, parallel: Parallel, rank: int, engine: EngineSpec, quant: Quant) -> int:
    """Bytes of all parameters of ``rank``, as the loader fills them. Raises :class:`ConfigError` where the model cannot be split so."""
    return sum(each.nbytes for each in stored_tensors(model, parallel, rank, dtype=engine.dtype, quant=quant))
