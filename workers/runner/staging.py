"""Numbers on their way to work beside the stream: pinned buffers that the host fills while earlier ones are still being copied.

Owns the buffers, and the rule that none is written before what it fed has run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.runner.device import Device
from workers.scheduler.step_plan import Ints


class Staging:
    """``depth`` buffers of ``words`` int32, used in turn."""

    def __init__(self, device: Device, *, words: int, depth: int) -> None:
        self._place = device.place
        self._buffers = [(device.pinned(words), device.mark()) for _ in range(depth)]
        self._turn = 0

    def send(self, numbers: Ints) -> Tensor:
        """``numbers`` on the device, once the copy that this starts is done. Waits for what the buffer fed ``depth`` turns ago."""
        buffer, mark = self._buffers[self._turn]
        mark.synchronize()
        buffer.numpy()[: len(numbers)] = numbers
        return torch.empty(len(numbers), dtype=torch.int32, device=self._place).copy_(buffer[: len(numbers)], non_blocking=True)

    def sent(self) -> None:
        """All that reads what was sent last is issued: the next buffer's turn."""
        self._buffers[self._turn][1].record()
        self._turn = (self._turn + 1) % len(self._buffers)
