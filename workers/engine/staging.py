"""Numbers on their way to the device: pinned buffers that the host fills while earlier ones are still being copied.

Owns the buffers, and the rule that none is written before its last copy has run. One copy a step, whatever a plan holds.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from workers.core.plan import Ints
from workers.engine.device import Device, Mark


class Staging:
    """``depth`` buffers of at least ``words`` int32 in turn: :meth:`open`, fill, :meth:`send`."""

    def __init__(self, device: Device, *, words: int, depth: int) -> None:
        self._device = device
        self._buffers = [device.pinned(words) for _ in range(depth)]
        self._marks: list[Mark | None] = [None] * depth
        self._turn = 0
        self._words = 0

    def open(self, words: int) -> Ints:
        """[words] int32 to write, contents undefined. Waits for the copy that this buffer last fed, ``depth`` steps ago."""
        mark = self._marks[self._turn]
        if mark is not None:
            mark.synchronize()
        if len(self._buffers[self._turn]) < words:
            self._buffers[self._turn] = self._device.pinned(2 * words)
        self._words = words
        return cast(Ints, self._buffers[self._turn].numpy())[:words]

    def send(self, into: Tensor) -> Tensor:
        """Start copying what was opened and written into ``into`` [words]; returns ``into``."""
        into.copy_(self._buffers[self._turn][: self._words], non_blocking=True)
        self._marks[self._turn] = self._device.mark()
        self._turn = (self._turn + 1) % len(self._buffers)
        return into
