"""Exchanges steps between a host and its device through two rings in host memory, without a call of the driver.

Owns the layout of a submission, the rule when its memory may be written again, and how a completion is read. The device counts submissions
and reads them in the order in which its programs run; it writes the number of the last one that it has read. A completion word holds a
token and the number of its step. The host polls that word until it holds the expected number, so it needs no copy and no event. Must never
know of plans.
"""

from __future__ import annotations

from typing import cast

from workers.distributed.group import Waiter
from workers.kernels.step_layout import HEADER_WORDS, NUMBER_MASK, Rings, aligned
from workers.runner.device import Device
from workers.runner.slot_updates import SlotUpdates
from workers.scheduler.step_plan import Ints

#: Failed polls between two checks whether the device still works; a check costs a call of the driver.
_POLLS_PER_CHECK = 256


class _PollCounter:
    """Counts failed polls of a ring and periodically calls ``device.check()``, which raises pending errors of the device."""

    def __init__(self, device: Device) -> None:
        self._device, self._failed = device, 0

    def failed_poll(self) -> bool:
        """Count a failed poll; every 256th asks the device for a pending error. Always returns False, for use in a waiting condition."""
        self._failed += 1
        if self._failed % _POLLS_PER_CHECK == 0:
            self._device.check()
        return False


class Submissions:
    """The host's side of the ring of submissions: :meth:`open` an entry, write the step's inputs to it, :meth:`send` it, then run exactly
    one program that reads it."""

    def __init__(self, rings: Rings, device: Device, waiter: Waiter) -> None:
        self._entries = [cast(Ints, entry.numpy()) for entry in rings.submissions]
        self._read, self._polls, self._waiter = rings.read.numpy(), _PollCounter(device), waiter
        self._last = int(self._read[0])

    def room(self, words: int) -> int:
        """Number of slot updates, and of returned tokens, that fit after ``words`` of step inputs."""
        # Three columns share the rest of the entry; alignment may cost each up to three words.
        return (len(self._entries[0]) - HEADER_WORDS - aligned(words)) // 3 - 4

    def open(self, words: int) -> Ints:
        """[words] int32 of the next entry for a step's inputs, contents undefined. Waits until the device has read the entry's previous
        content, which was sent ``depth`` submissions ago."""
        self._waiter.until(self._is_read)
        return self._entries[(self._last + 1) % len(self._entries)][HEADER_WORDS : HEADER_WORDS + words]

    def _is_read(self) -> bool:
        unread = (self._last - int(self._read[0])) & NUMBER_MASK
        return unread < len(self._entries) or self._polls.failed_poll()

    def send(self, step: int, words: int, updates: SlotUpdates) -> None:
        """Complete the opened entry, which holds ``words`` of step inputs, with ``updates``, for which there must be :meth:`room`."""
        self._last = (self._last + 1) & NUMBER_MASK
        entry = self._entries[self._last % len(self._entries)]
        count, returned = len(updates.indices), len(updates.returned)
        entry[0], entry[1], entry[2], entry[3] = words, count, returned, step & NUMBER_MASK
        if count or returned:
            begin = HEADER_WORDS + aligned(words)
            for column in updates:
                entry[begin : begin + len(column)] = column
                begin += aligned(len(column))


class Completions:
    """The host's side of the ring of completions. A step's tokens stay readable until ``depth`` more steps have run."""

    def __init__(self, rings: Rings, device: Device) -> None:
        pairs = rings.completions.numpy().view("<i4").reshape(*rings.completions.shape, 2)
        self._tokens = [cast(Ints, ring[:, 0]) for ring in pairs]
        self._numbers = [cast(Ints, ring[:, 1]) for ring in pairs]
        self._device = device

    def of(self, step: int, count: int) -> Completion:
        """The completion of ``step``, which yields ``count`` tokens. A step that yields none is completed by one padding sequence."""
        number = step & NUMBER_MASK
        at = number % len(self._tokens)
        return Completion(self._tokens[at][:count], self._numbers[at][: max(count, 1)], number, _PollCounter(self._device))


class Completion:
    """The tokens of one step, which may still be pending. ``tokens`` [N] int32 are valid once :meth:`ready`; -1 = no logit is finite."""

    def __init__(self, tokens: Ints, numbers: Ints, number: int, polls: _PollCounter) -> None:
        self.tokens = tokens
        self._numbers, self._number, self._polls = numbers, number, polls

    def ready(self) -> bool:
        """Whether all tokens of the step have arrived. Raises a pending error of the device."""
        # The last sequence usually finishes last: poll it first, then check all.
        if self._numbers[-1] == self._number and bool((self._numbers == self._number).all()):
            return True
        return self._polls.failed_poll()
