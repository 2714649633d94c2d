"""The prefixes in TensorRT-LLM's cache, as the project's own hashes.

TensorRT-LLM has its own block hashes and salts them with an integer that its events do not contain; routers use chains of
:func:`workers.scheduler.block_pool.prefix_hashes`. Owns the map between the two: it hashes the tokens that sequences are expected to store;
when an event reports these tokens with this parent, the block is known. Pure; a wrong or missing entry costs time at a router, never a
token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from workers.scheduler.block_pool import prefix_hashes

#: Hashes in one heartbeat, and the maximum number of expected or known blocks.
MAX_HOT, MAX_EXPECTED, MAX_KNOWN = 128, 16_384, 65_536

_BlockKey = tuple[int | None, tuple[int, ...]]


class HotPrefixes:
    """``block_size`` in tokens, known once the cache exists."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        #: (parent's hash, the block's tokens) -> the block's hash. If first blocks of two tenants have the same tokens, the later one wins.
        self._expected: OrderedDict[_BlockKey, int] = OrderedDict()
        #: TensorRT-LLM's hash -> our prefix hash, least recently stored first.
        self._known: OrderedDict[int, int] = OrderedDict()
        self._last_event = -1

    def take_event(self, event_id: int) -> None:
        """Record the next event's number. After a gap, events were lost, so all known blocks are forgotten."""
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
        """TensorRT-LLM stored a chain of (TensorRT-LLM's hash, tokens) after its block ``parent``; None or 0 = at the start."""
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
        """The most recently stored blocks that still exist, parents before children."""
        recent = list(self._known.values())[-MAX_HOT:]
        return list(dict.fromkeys(recent))
