"""Paged keys and values of one rank.

Owns the cache's memory and how many blocks it has. Must never know which row holds a block: block ids come with the plan. One block more
than the leader may hand out exists, :attr:`KvCache.dummy`: it stays zero, and is what padding reads.
"""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor

from workers.distributed.group import Group
from workers.layout.sharding import Shard
from workers.protocol.specs import ModelSpec


def free_bytes(device: torch.device) -> int:
    """What is free now on ``device``, or on this host where it is the CPU."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


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
