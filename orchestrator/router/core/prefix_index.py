"""The router's estimate of each replica's prefix cache.

Owns, for each replica that is not lost, the hashes of the blocks that this router sent there or that the replica reported. It is only an
estimate: a wrong entry costs time, never a token. Hashes come from :func:`workers.scheduler.block_pool.prefix_hashes`, which the caches use
too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from orchestrator.router.core.choice_state import ChoiceState, RequestState
from orchestrator.router.core.replica_registry import Replica
from workers.scheduler.block_pool import prefix_hashes

#: Maximum number of hashes per replica, whatever the size of its cache.
MAX_HASHES = 65_536


class PrefixIndex:
    """The hashes of one replica: at most ``limit`` = ``min(num_blocks, MAX_HASHES)``, the least recently used are dropped first."""

    __slots__ = ("_hashes", "_limit")

    def __init__(self, num_blocks: int) -> None:
        self._limit = min(num_blocks, MAX_HASHES)
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def matched(self, chain: Sequence[int]) -> int:
        """How many leading blocks of ``chain`` are known."""
        known = self._hashes
        for index, value in enumerate(chain):
            if value not in known:
                return index
        return len(chain)

    def add(self, chain: Sequence[int]) -> None:
        """Remember a chain, from its end: leaves age before their parents, as in the cache itself."""
        known = self._hashes
        for value in reversed(chain[: self._limit]):
            known[value] = None
            known.move_to_end(value)
        while len(known) > self._limit:
            known.popitem(last=False)


class PrefixLookup(Protocol):
    """The routing core's interface to prefixes. Prompts and hashes stay behind this interface."""

    def cached_tokens(self, request: RequestState, replicas: Sequence[Replica]) -> list[int]:
        """Leading tokens of the prompt that each of ``replicas`` probably holds."""

    def note_sent(self, request: RequestState, replica: Replica) -> None:
        """A choice of ``request`` was sent to ``replica``."""

    def note_end(self, choice: ChoiceState, replica: Replica) -> None:
        """``choice`` has ended at ``replica``: its output is in the cache now too, and the next turn of a chat starts with it."""

    def note_cached(self, replica: Replica, hashes: Sequence[int]) -> None:
        """The replica reports blocks that its cache holds, parents first."""

    def forget(self, replica: Replica) -> None:
        """The replica is lost: the cache of its next process is empty."""


class PrefixIndexes:
    """One :class:`PrefixIndex` for each replica that has a prefix cache, by name; see :class:`PrefixLookup`."""

    def __init__(self) -> None:
        self._indexes: dict[str, PrefixIndex] = {}

    def cached_tokens(self, request: RequestState, replicas: Sequence[Replica]) -> list[int]:
        found = []
        for replica in replicas:
            index, size = self._indexes.get(replica.name), replica.capacity.block_size
            found.append(index.matched(request.prompt_hashes(size)) * size if index is not None else 0)
        return found

    def note_sent(self, request: RequestState, replica: Replica) -> None:
        if replica.capacity.prefix_cache:
            self._index(replica).add(request.prompt_hashes(replica.capacity.block_size))

    def note_end(self, choice: ChoiceState, replica: Replica) -> None:
        if replica.capacity.prefix_cache:
            spec = choice.request.spec
            self._index(replica).add(prefix_hashes(spec.prompt_ids + choice.emitted, replica.capacity.block_size, spec.salt))

    def note_cached(self, replica: Replica, hashes: Sequence[int]) -> None:
        if replica.capacity.prefix_cache:
            self._index(replica).add(hashes)

    def forget(self, replica: Replica) -> None:
        self._indexes.pop(replica.name, None)

    def _index(self, replica: Replica) -> PrefixIndex:
        index = self._indexes.get(replica.name)
        if index is None:
            index = self._indexes[replica.name] = PrefixIndex(replica.capacity.num_blocks)
        return index
