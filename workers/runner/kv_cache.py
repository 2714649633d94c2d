"""Paged keys and values of one rank.

Owns the cache's memory and the number of its blocks. Must never know which sequence holds a block: block ids come with the plan. The leader
alone allocates and frees blocks: :class:`workers.scheduler.block_pool.BlockPool`, called by :mod:`workers.scheduler.scheduler`. The cache
has one more block than the leader may allocate, :attr:`KvCache.padding_block`: it stays zero, and padding reads it.
"""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.layout.sharding import Shard
from workers.protocol.specs import ModelSpec


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free bytes, total bytes) on ``device``, or on this host if the device is the CPU."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def fewest_blocks(group: Group, blocks: int) -> int:
    """The smallest ``blocks`` among all members of ``group``."""
    return int(group.all_gather(torch.tensor([blocks], dtype=torch.int64)).min())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of ``shape``. On a CPU, pages use no memory before they are written (``torch.zeros`` would write all of them)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    unit = {4: np.int32, 2: np.int16}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, unit)).view(dtype)


class KvCache:
    """``layers``: one tensor a layer, [blocks + 1, block_size, 2 * kv_heads, head_dim], keys' heads before values' heads, initially zero.

    On a CPU, blocks that no sequence has used take no memory.
    """

    def __init__(self, model: ModelSpec, shard: Shard, *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.block_size = blocks, block_size
        self.padding_block = blocks
        shape = (blocks + 1, block_size, 2 * shard.kv_heads.size, model.head_dim)
        self.layers: list[Tensor] = [_zeros(shape, dtype, device) for _ in range(shard.layers.size)]

    def clear(self, blocks: Tensor) -> None:
        """Zero ``blocks`` [B] before their first use: a failed sequence may have left NaN there, and a masked 0 * NaN is still NaN."""
        for layer in self.layers:
            layer.index_fill_(0, blocks, 0)
