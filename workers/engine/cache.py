"""Paged keys and values of one rank.

Owns the cache's memory and how many blocks it has. Must never know which row holds a block: block ids come with the plan. One block more
than the leader may hand out exists, :attr:`KvCache.dummy`: it stays zero, and is what padding reads.
"""

from __future__ import annotations

import logging

import numpy as np
import psutil
import torch
from torch import Tensor

from workers.core.shard import Shard
from workers.engine.comm import Group
from workers.errors import ConfigError
from workers.spec import DTYPE_BYTES, EngineSpec, ModelSpec

#: Default share of a host's free memory for the caches of all its ranks together, and its cap, bytes.
FREE_SHARE = 0.25
HOST_CAP = 1 << 30
#: What a GPU keeps free beside cache and step: graphs, workspaces of libraries, NCCL, and the torch sampler's rows.
GPU_RESERVE = 2 << 30

log = logging.getLogger("trireme.engine")


def block_bytes(model: ModelSpec, shard: Shard, engine: EngineSpec, itemsize: int | None = None) -> int:
    """Bytes of one block on this rank, all its layers. ``itemsize``: bytes of an element, the engine's dtype's if not given."""
    return shard.layers.size * engine.block_size * 2 * shard.kv_heads.size * model.head_dim * (itemsize or DTYPE_BYTES[engine.dtype])


def blocks_that_fit(
    model: ModelSpec,
    shard: Shard,
    engine: EngineSpec,
    *,
    host_ranks: int,
    free_bytes: int | None = None,
    itemsize: int | None = None,
    budget: int | None = None,
) -> int:
    """Blocks that this rank can hold: as ``kv_tokens`` or ``kv_bytes`` (of this rank) say, else in ``budget`` bytes of a GPU, else in this
    rank's part of the default share of its host.

    ``host_ranks``: ranks on this host; ``free_bytes``: the host's free memory, measured if not given. Raises :class:`ConfigError` if not
    even one block fits.
    """
    each = block_bytes(model, shard, engine, itemsize)
    if engine.kv_tokens:
        return -(-engine.kv_tokens // engine.block_size)
    if engine.kv_bytes:
        budget = engine.kv_bytes
    elif budget is None:
        free = psutil.virtual_memory().available if free_bytes is None else free_bytes
        budget = int(min(free * FREE_SHARE, HOST_CAP)) // host_ranks
    if budget < each:
        raise ConfigError(
            f"{budget} bytes of KV cache hold no block of {each} bytes",
            "too little free memory or kv_bytes too small",
            "raise kv_bytes, or lower block_size",
        )
    return budget // each


def step_bytes(model: ModelSpec, shard: Shard, engine: EngineSpec) -> int:
    """Most bytes that one step's own tensors take on this rank: the widest moments of a layer, and the logits of all rows."""
    item = DTYPE_BYTES[engine.dtype]
    qkv = (shard.heads.size + 2 * shard.kv_heads.size) * model.head_dim
    token = item * (4 * model.hidden_size + max(3 * shard.ffn.size, 2 * qkv) + 2 * qkv)
    logits = 2 * item * shard.vocab_rows * engine.max_batch_size if shard.last else 0
    return token * engine.max_num_tokens + logits


def gpu_budget(model: ModelSpec, shard: Shard, engine: EngineSpec, device: torch.device) -> int:
    """Bytes of ``device`` that the cache may take: what is free once the weights are there, less a step's tensors and ``GPU_RESERVE``."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    step = step_bytes(model, shard, engine)
    log.info("GPU memory: %.1f GB free, %.1f GB for a step, %.1f GB in reserve", free / 1e9, step / 1e9, GPU_RESERVE / 1e9)
    return max(0, free - step - GPU_RESERVE)


def agree(group: Group, blocks: int) -> int:
    """The smallest ``blocks`` of all members."""
    return int(group.all_gather(torch.tensor([blocks], dtype=torch.int64)).min())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU such that pages cost no memory before they are written (``torch.zeros`` writes them all)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    unit = {4: np.int32, 2: np.int16}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, unit)).view(dtype)


class KvCache:
    """One tensor a layer, [blocks + 1, block_size, 2 * kv_heads, head_dim], keys' heads before values', zero at first.

    Where a row has never been, a CPU's cache takes no memory.
    """

    def __init__(self, model: ModelSpec, shard: Shard, *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.block_size = blocks, block_size
        self.dummy = blocks
        shape = (blocks + 1, block_size, 2 * shard.kv_heads.size, model.head_dim)
        self.layers: list[Tensor] = [_zeros(shape, dtype, device) for _ in range(shard.layers.size)]

    def clear(self, blocks: Tensor) -> None:
        """Zero ``blocks`` [B] before their first use: a faulted row may have left NaN there, and a masked 0 * NaN is still NaN."""
        for layer in self.layers:
            layer.index_fill_(0, blocks, 0)
