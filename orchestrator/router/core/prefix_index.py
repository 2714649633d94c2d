"""What a router believes each replica's prefix cache holds, and what a wait is worth against it.

Owns the record of block hashes that this router sent to one replica, bounded by that replica's own cache, oldest out first. A guess only:
a wrong one costs time, never a token. Hashes come from :func:`workers.scheduler.block_pool.prefix_hashes`, the function that the caches use
too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

#: Hashes remembered per replica at most, whatever its cache holds.
MAX_HASHES = 65_536


class PrefixIndex:
    """Least-recently-used set of chained block hashes, at most ``limit`` = ``min(num_blocks, MAX_HASHES)``; 0: there is no such cache."""

    __slots__ = ("_hashes", "limit")

    def __init__(self, num_blocks: int) -> None:
        self.limit = max(0, min(num_blocks, MAX_HASHES))
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def matched(self, chain: Sequence[int]) -> int:
        """How many leading blocks of ``chain`` are on record."""
        known = self._hashes
        for index, value in enumerate(chain):
            if value not in known:
                return index
        return len(chain)

    def add(self, chain: Sequence[int]) -> None:
        """Remember a chain. Leaves age before parents, as in the cache itself: the chain is touched from its end."""
        known = self._hashes
        for value in reversed(chain[: self.limit]):
            known[value] = None
            known.move_to_end(value)
        while len(known) > self.limit:
            known.popitem(last=False)

    def clear(self) -> None:
        self._hashes.clear()


def expected_wait_ms(
    *,
    step_ms: float,
    rows: int,
    max_rows: int,
    step_tokens: int,
    queued_tokens: int,
    own_tokens: int,
    cached_tokens: int,
    row_ms: float,
    output_tokens: float,
) -> float:
    """Time that a row would lose at a replica before and while it is decoded, ms; the choice is the replica where it is least.

    The wait for its first token, and the share of a step by which ``rows`` neighbours slow each of its own about ``output_tokens`` steps.
    The latter is what keeps a popular prefix from becoming a hot spot.
    """
    first = first_token_ms(
        step_ms=step_ms, rows=rows, max_rows=max_rows, step_tokens=step_tokens, queued_tokens=queued_tokens,
        new_tokens=own_tokens - cached_tokens, row_ms=row_ms,
    )  # fmt: skip
    return first + step_ms * output_tokens * min(rows, max_rows) / step_tokens


def first_token_ms(
    *, step_ms: float, rows: int, max_rows: int, step_tokens: int, queued_tokens: int, new_tokens: int, row_ms: float
) -> float:
    """Time from a row's arrival at a replica to its first token, ms.

    The prompt tokens before it and its own ``new_tokens`` go through steps that hold ``step_tokens``, less one per decoding row. Rows
    beyond ``max_rows`` wait for others to end, one each ``row_ms / max_rows``.
    """
    budget = max(1, step_tokens - min(rows, max_rows))
    prefill = (queued_tokens + max(1, new_tokens)) / budget
    return step_ms * prefill + max(0, rows + 1 - max_rows) * row_ms / max_rows
