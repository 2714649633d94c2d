"""How a host and its device tell each other of steps: two rings in memory of the host that both see, and no call of the driver's.

Owns what stands where in a submission, when its memory may be written again, and how a completion is read. A device takes submissions in
the order in which its programs run, by a count of its own, and writes how far it has read. The word of a row that is done carries the
number of its step, so it is there when its number is: there is neither a copy nor an event to wait for. Must never know of plans.
"""

from __future__ import annotations

from typing import cast

from workers.distributed.group import Waiter
from workers.kernels.step_layout import HEAD_WORDS, NUMBER_MASK, Rings, aligned
from workers.runner.device import Device
from workers.runner.slot_updates import SlotUpdates
from workers.scheduler.step_plan import Ints

#: Looks at what a device has written after which it is asked whether it still works: that costs a call of the driver's.
_LOOKS = 256


class _Watch:
    """Looks in vain, some of which ask ``device``. It raises what its work ran into."""

    def __init__(self, device: Device) -> None:
        self._device, self._looks = device, 0

    def in_vain(self) -> bool:
        """False, always."""
        self._looks += 1
        if self._looks % _LOOKS == 0:
            self._device.check()
        return False


class Submissions:
    """What the device is to know, an entry a turn: :meth:`open`, write, :meth:`send`, then run one program that takes it."""

    def __init__(self, rings: Rings, device: Device, waiter: Waiter) -> None:
        self._entries = [cast(Ints, entry.numpy()) for entry in rings.submissions]
        self._read, self._watch, self._waiter = rings.read.numpy(), _Watch(device), waiter
        self._turn = int(self._read[0])

    def room(self, words: int) -> int:
        """News that fit behind an inbox of ``words``, and as many returns."""
        return (len(self._entries[0]) - HEAD_WORDS - aligned(words)) // 3 - 4

    def open(self, words: int) -> Ints:
        """[words] int32 for an inbox, contents undefined. Waits until the device has read what stood there, ``depth`` turns ago."""
        self._waiter.until(self._is_read)
        return self._entries[(self._turn + 1) % len(self._entries)][HEAD_WORDS : HEAD_WORDS + words]

    def _is_read(self) -> bool:
        behind = (self._turn - int(self._read[0])) & NUMBER_MASK
        return behind < len(self._entries) or self._watch.in_vain()

    def send(self, step: int, words: int, news: SlotUpdates) -> None:
        """The opened entry is whole: it has ``words`` of an inbox, and ``news``, for which there is :meth:`room`."""
        self._turn = (self._turn + 1) & NUMBER_MASK
        entry = self._entries[self._turn % len(self._entries)]
        count, returns = len(news.places), len(news.returns)
        entry[0], entry[1], entry[2], entry[3] = words, count, returns, step & NUMBER_MASK
        if count or returns:
            begin = HEAD_WORDS + aligned(words)
            for column in news:
                entry[begin : begin + len(column)] = column
                begin += aligned(len(column))


class Completions:
    """What the device says of steps, until ``depth`` more have run."""

    def __init__(self, rings: Rings, device: Device) -> None:
        pairs = rings.completions.numpy().view("<i4").reshape(*rings.completions.shape, 2)
        self._tokens = [cast(Ints, ring[:, 0]) for ring in pairs]
        self._numbers = [cast(Ints, ring[:, 1]) for ring in pairs]
        self._device = device

    def of(self, step: int, rows: int) -> Completion:
        """The first ``rows`` rows of ``step``, at least one of which there is."""
        number = step & NUMBER_MASK
        at = number % len(self._tokens)
        return Completion(self._tokens[at][:rows], self._numbers[at][: max(rows, 1)], number, _Watch(self._device))


class Completion:
    """A step's rows, to come. ``tokens`` [rows] int32: theirs once :meth:`ready`, -1 where nothing is finite."""

    def __init__(self, tokens: Ints, numbers: Ints, number: int, watch: _Watch) -> None:
        self.tokens = tokens
        self._numbers, self._number, self._watch = numbers, number, watch

    def ready(self) -> bool:
        # The last row is mostly the last: one look, and then at all.
        if self._numbers[-1] == self._number and bool((self._numbers == self._number).all()):
            return True
        return self._watch.in_vain()
