"""The KV block pool and the prefix index of one replica.

Owns which block holds which tokens, its users, and the order in which unused blocks are evicted. Must never access K/V memory (ranks do, by
block id) nor know what a request is. :func:`prefix_hashes` is the only prefix hash of the project, so that the router's expectation and
this cache always agree.

A block is *free* (content unknown), *held* (users > 0) or *idle* (no user, content findable). Only full blocks are findable, and a sequence
that holds a block holds the block's whole prefix, so:

- a shared block is never written;
- blocks go idle leaves first, hence the idle order (least recently used first) has every child before its parent, and
  eviction from its front never leaves a findable block without its parent.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from struct import pack

import msgspec


def prefix_hashes(tokens: Sequence[int], block_size: int, salt: str, *, parent: int | None = None) -> list[int]:
    """Hashes (64 bits, unsigned) of each full block of ``tokens``, each over (parent's hash, its tokens); the chain starts at ``salt``.

    ``parent``: hash of the block before ``tokens[0]``, to continue a chain instead of starting one.
    """
    size = block_size * 4
    data = pack(f"<{len(tokens)}i", *tokens)
    digest = blake2b(salt.encode(), digest_size=8).digest() if parent is None else parent.to_bytes(8, "little")
    hashes = []
    for end in range(size, len(data) + 1, size):
        digest = blake2b(digest + data[end - size : end], digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
    return hashes


class _Content(msgspec.Struct, frozen=True, gc=False):
    """The content of a findable block; ``parent`` is a block id, -1 at the start of a chain."""

    hash: int
    parent: int
    salt: str
    tokens: tuple[int, ...]


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens. With ``findable`` False no block is reused by content.

    Single-threaded; every call is O(blocks in its arguments), except :meth:`forget` and :meth:`check`, which visit the whole index.
    """

    def __init__(self, num_blocks: int, block_size: int, *, findable: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.findable = findable
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        # The first entry is removed repeatedly. A dict would each time search past all entries removed before.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._index: dict[int, int] = {}
        self._contents: dict[int, _Content] = {}

    @property
    def available(self) -> int:
        """Number of blocks that :meth:`allocate` could return now."""
        return len(self._free) + len(self._idle)

    def match(self, hashes: Sequence[int], tokens: Sequence[int], salt: str) -> list[int]:
        """The longest findable chain for ``hashes`` (as from :func:`prefix_hashes` over ``tokens`` and ``salt``), not yet held.

        Tokens and salt are compared along the chain, so a hash collision costs a miss and never returns other content.
        """
        found: list[int] = []
        parent, size = -1, self.block_size
        for i, key in enumerate(hashes):
            block = self._index.get(key, -1)
            if block < 0:
                break
            content = self._contents[block]
            if content.parent != parent or content.salt != salt or content.tokens != tuple(tokens[i * size : (i + 1) * size]):
                break
            found.append(block)
            parent = block
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a user to blocks that :meth:`match` found."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """``count`` private blocks with one user each, or None (without a change) if there are not enough."""
        if count > self.available:
            return None
        taken: list[int] = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from ``blocks``, given in sequence order; blocks without a user become idle if findable, else free."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._contents:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, *, hash: int, parent: int, salt: str, tokens: Sequence[int]) -> bool:
        """Make a held, full, computed block findable after its findable ``parent`` (-1 = none).

        Returns False if that is not possible, because ``hash`` already names another block or ``parent`` was forgotten. The caller must
        then publish none of its later blocks: it does not hold that other block, so the other block could be evicted before its children.
        """
        if not self.findable or hash in self._index or (parent >= 0 and parent not in self._contents):
            return False
        self._index[hash] = block
        self._contents[block] = _Content(hash, parent, salt, tuple(tokens))
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """Make ``blocks`` and all blocks that follow them unfindable, because their content may be wrong. Users keep them."""
        forgotten = set(blocks)
        for block, content in list(self._contents.items()):  # parents were published before their children
            if block in forgotten or content.parent in forgotten:
                forgotten.add(block)
                self._unpublish(block)
                if self._users[block] == 0:
                    del self._idle[block]
                    self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._unpublish(block)
        return block

    def _unpublish(self, block: int) -> None:
        del self._index[self._contents.pop(block).hash]

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Check every invariant; ``tables`` are the block lists of all users. Raises AssertionError naming the first one broken."""
        held = Counter(block for table in tables for block in table)
        free = set(self._free)
        assert all(self._users[block] == count for block, count in held.items()), "user counts differ from the tables"
        assert self._users.count(0) == self.num_blocks - len(held), "a block is held without a user"
        assert len(held) + len(self._free) + len(self._idle) == self.num_blocks, "a block is lost or counted twice"
        assert free.isdisjoint(held) and self._idle.keys().isdisjoint(held), "a held block is up for reuse"
        assert free.isdisjoint(self._idle) and len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(self._contents), "a free block is findable"
        assert self._idle.keys() <= self._contents.keys(), "an idle block is not findable"
        assert self._index == {content.hash: block for block, content in self._contents.items()}, "index and contents differ"
        age = {block: i for i, block in enumerate(self._idle)}
        for block, content in self._contents.items():
            assert len(content.tokens) == self.block_size, "a part of a block is findable"
            if content.parent >= 0:
                assert content.parent in self._contents, "a findable block's parent is not"
                assert self._contents[content.parent].salt == content.salt, "a chain crosses tenants"
                assert content.parent in held or age.get(block, -1) < age[content.parent], "a parent would be evicted before its child"
                assert block not in held or content.parent in held, "a held block's parent is not held"
