"""Which prefixes TensorRT-LLM's cache holds, in the project's own hashes.

TensorRT-LLM names blocks by hashes of its own and salts them by an integer that its events do not tell; routers know chains of
:func:`workers.scheduler.block_pool.prefix_hashes`. Owns the map between the two: what rows are expected to store is hashed here, and an
event that stores those tokens behind that parent makes the block known. Pure; a wrong or missing entry costs time at a router, never a
token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from workers.scheduler.block_pool import prefix_hashes

#: Hashes that one heartbeat names, and blocks that are expected or known at most.
MAX_HOT, MAX_EXPECTED, MAX_KNOWN = 128, 16_384, 65_536

_Place = tuple[int | None, tuple[int, ...]]


class HotPrefixes:
    """``block_size`` in tokens, known once the cache exists."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        #: (parent's hash, the block's tokens) -> the block's hash. Two tenants' first blocks with the same tokens: the later one wins.
        self._expected: OrderedDict[_Place, int] = OrderedDict()
        #: TensorRT-LLM's hash -> ours, least recently stored first.
        self._known: OrderedDict[int, int] = OrderedDict()

    def expect(self, tokens: Sequence[int], salt: str) -> None:
        """A row with this known prefix is about to run."""
        size, parent = self._block_size, None
        for i, value in enumerate(prefix_hashes(tokens, size, salt)):
            place = (parent, tuple(tokens[i * size : (i + 1) * size]))
            self._expected[place] = parent = value
            self._expected.move_to_end(place)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def stored(self, parent: int | None, blocks: Iterable[tuple[int, Sequence[int]]]) -> None:
        """TensorRT-LLM stored a chain of (its hash, tokens) behind its block ``parent``; None or 0 = at the start."""
        ours = self._known.get(parent) if parent else None
        if parent and ours is None:
            return
        for theirs, tokens in blocks:
            value = self._expected.get((ours, tuple(tokens)))
            if value is None:
                return
            self._known[theirs] = ours = value
            self._known.move_to_end(theirs)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def removed(self, hashes: Iterable[int]) -> None:
        for theirs in hashes:
            self._known.pop(theirs, None)

    def clear(self) -> None:
        """Events were lost: nothing is known any more."""
        self._known.clear()

    def hot(self) -> list[int]:
        """The most recently stored blocks that are still there, parents before children."""
        recent = list(self._known.values())[-MAX_HOT:]
        return list(dict.fromkeys(recent))
