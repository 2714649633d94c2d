"""Which prefixes TensorRT-LLM's cache holds, in the project's own hashes.

TensorRT-LLM names blocks by hashes of its own and salts them by an integer that its events do not carry; routers know chains of
:func:`workers.scheduler.block_pool.prefix_hashes`. Owns the map between the two: it hashes what sequences are expected to store, and an
event that stores those tokens after that parent makes the block known. Pure; a wrong or missing entry costs time at a router, never a
token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from workers.scheduler.block_pool import prefix_hashes

#: Hashes that one heartbeat names, and blocks that are expected or known at most.
MAX_HOT, MAX_EXPECTED, MAX_KNOWN = 128, 16_384, 65_536

_BlockKey = tuple[int | None, tuple[int, ...]]


class HotPrefixes:
    """``block_size`` in tokens, known once the cache exists."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        #: (parent's hash, the block's tokens) -> the block's hash. Two tenants' first blocks with the same tokens: the later one wins.
        self._expected: OrderedDict[_BlockKey, int] = OrderedDict()
        #: TensorRT-LLM's hash -> our prefix hash, least recently stored first.
        self._known: OrderedDict[int, int] = OrderedDict()
        self._last_event = -1

    def take_event(self, event_id: int) -> None:
        """Take note of the next event's number. A gap means that events were lost: then no block is known any more."""
        if self._last_event >= 0 and event_id != self._last_event + 1:
            self._known.clear()
        self._last_event = event_id

    def expect(self, tokens: Sequence[int], salt: str) -> None:
        """A sequence with these known tokens is about to run."""
        size, parent = self._block_size, None
        for i, value in enumerate(prefix_hashes(tokens, size, salt)):
            key = (parent, tuple(tokens[i * size : (i + 1) * size]))
            self._expected[key] = parent = value
            self._expected.move_to_end(key)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def stored(self, parent: int | None, blocks: Iterable[tuple[int, Sequence[int]]]) -> None:
        """TensorRT-LLM stored a chain of (its hash, tokens) after its block ``parent``; None or 0 = at the start."""
        prefix = self._known.get(parent) if parent else None
        if parent and prefix is None:
            return
        for block, tokens in blocks:
            prefix = self._expected.get((prefix, tuple(tokens)))
            if prefix is None:
                return
            self._known[block] = prefix
            self._known.move_to_end(block)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def removed(self, hashes: Iterable[int]) -> None:
        for block in hashes:
            self._known.pop(block, None)

    def hot(self) -> list[int]:
        """The most recently stored blocks that are still there, parents before children."""
        recent = list(self._known.values())[-MAX_HOT:]
        return list(dict.fromkeys(recent))
