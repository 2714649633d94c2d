"""Numbers on their way to the device: pinned buffers that the host fills while earlier ones are still being copied.

Owns the buffers, and the rule that none is written before what it fed has run. One copy a step, whatever a plan holds.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from workers.core.plan import Ints
from workers.engine.device import Device, Mark

#: Copies are of so many words, or several times as many: few lengths, whose views are made once.
_WORDS = 256


class Pinned:
    """``words`` int32 of the host, from and to which copies run beside it: as an array, and as a tensor of every beginning once used."""

    def __init__(self, device: Device, words: int) -> None:
        self._tensor = device.pinned(words)
        self.array = cast(Ints, self._tensor.numpy())
        self._views: dict[int, Tensor] = {}

    def view(self, words: int) -> Tensor:
        found = self._views.get(words)
        if found is None:
            found = self._views[words] = self._tensor[:words]
        return found


class Staging:
    """``depth`` buffers of at least ``words`` int32 in turn: :meth:`open`, fill, :meth:`send`, :meth:`sent`."""

    def __init__(self, device: Device, *, words: int, depth: int) -> None:
        self._device = device
        self._buffers = [Pinned(device, rounded(words)) for _ in range(depth)]
        self._marks = [device.mark() for _ in range(depth)]
        self._turn = 0

    def open(self, words: int) -> Ints:
        """[words] int32 to write, contents undefined. Waits for what this buffer last fed, ``depth`` steps ago."""
        self._marks[self._turn].synchronize()
        if len(self._buffers[self._turn].array) < words:
            self._buffers[self._turn] = Pinned(self._device, rounded(2 * words))
        return self._buffers[self._turn].array[:words]

    def send(self, into: Tensor) -> None:
        """Start copying what was opened and written into ``into``, whose length is one of few."""
        into.copy_(self._buffers[self._turn].view(len(into)), non_blocking=True)

    def sent(self) -> Mark:
        """The end of the work issued so far, all that reads what was sent; the next buffer's turn. The mark is this buffer's: it stands
        there until the buffer is sent again."""
        mark = self._marks[self._turn]
        mark.record()
        self._turn = (self._turn + 1) % len(self._buffers)
        return mark


def rounded(words: int) -> int:
    """The length of a copy that holds ``words``."""
    return -(-words // _WORDS) * _WORDS
