"""The block pool: hash chain, sharing, eviction order, and what check() catches."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.examples import examples
from workers.scheduler.block_pool import BlockPool, prefix_hashes


def publish_chain(pool: BlockPool, blocks: list[int], tokens: list[int], salt: str = "") -> None:
    size = pool.block_size
    for i, (block, key) in enumerate(zip(blocks, prefix_hashes(tokens, size, salt), strict=True)):
        parent = blocks[i - 1] if i else -1
        assert pool.publish(block, hash=key, parent=parent, salt=salt, tokens=tokens[i * size : (i + 1) * size])


def find(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    return pool.match(prefix_hashes(tokens, pool.block_size, salt), tokens, salt)


def test_hashes_chain_over_parent_tokens_and_salt() -> None:
    tokens = list(range(100))
    hashes = prefix_hashes(tokens, 16, "a")
    assert len(hashes) == 6 and len(set(hashes)) == 6 and all(0 <= key < 2**64 for key in hashes)
    assert prefix_hashes(tokens[:50], 16, "a") == hashes[:3]
    assert prefix_hashes(tokens[32:], 16, "a", parent=hashes[1]) == hashes[2:]
    assert prefix_hashes([7, *tokens[1:]], 16, "a")[5] != hashes[5]
    assert not set(prefix_hashes(tokens, 16, "b")) & set(hashes)
    assert prefix_hashes(tokens[:15], 16, "a") == []


def test_hashes_are_the_same_in_every_process_and_release() -> None:
    """The router and the replicas are different processes, perhaps of different versions."""
    assert prefix_hashes(list(range(16)), 8, "tenant") == [0x914306FA606CA6ED, 0x7841FE733F5AD788]


def test_eight_thousand_tokens_hash_fast() -> None:
    tokens = list(range(8192))
    best = min(_timed(lambda: prefix_hashes(tokens, 16, "")) for _ in range(20))
    assert best < 2e-3  # about 0.4 ms


def _timed(work: object) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def test_released_blocks_stay_findable_until_evicted_leaves_first() -> None:
    pool = BlockPool(4, 8)
    tokens = list(range(24))
    chain = pool.allocate(3)
    publish_chain(pool, chain, tokens)
    pool.check([chain])
    pool.release(chain)
    assert pool.available == 4 and find(pool, tokens) == chain
    other = pool.allocate(2)  # the free one, then the chain's last
    assert find(pool, tokens) == chain[:2]
    more = pool.allocate(1)
    assert find(pool, tokens) == chain[:1]
    pool.check([other, more])


def test_least_recently_used_chain_goes_first() -> None:
    pool = BlockPool(4, 8)
    old, new = list(range(16)), list(range(50, 66))
    for tokens in (old, new):
        blocks = pool.allocate(2)
        publish_chain(pool, blocks, tokens)
        pool.release(blocks)
    used = find(pool, old)
    pool.hold(used)
    pool.release(used)
    pool.allocate(2)
    assert find(pool, new) == [] and find(pool, old) == used


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3, 8)
    held = pool.allocate(2)
    assert pool.allocate(2) is None
    pool.check([held])
    assert pool.allocate(0) == [] and len(pool.allocate(1)) == 1


def test_shared_blocks_are_counted() -> None:
    pool = BlockPool(4, 8)
    tokens = list(range(16))
    mine = pool.allocate(2)
    publish_chain(pool, mine, tokens)
    theirs = find(pool, tokens)
    pool.hold(theirs)
    pool.check([mine, theirs])
    pool.release(mine)
    assert pool.available == 2
    pool.release(theirs)
    assert pool.available == 4
    pool.check()


def test_a_collision_or_a_wrong_salt_is_a_miss() -> None:
    pool = BlockPool(4, 8)
    tokens = list(range(16))
    publish_chain(pool, pool.allocate(2), tokens)
    hashes = prefix_hashes(tokens, 8, "")
    assert pool.match(hashes, [99, *tokens[1:]], "") == []
    assert len(pool.match(hashes, [*tokens[:15], 99], "")) == 1
    assert pool.match(hashes, tokens, "other") == []
    assert pool.match(hashes[1:], tokens[8:], "") == []  # the second block, asked for as if it were a first one


def test_a_duplicate_is_not_published() -> None:
    pool = BlockPool(4, 8)
    first, second = pool.allocate(1), pool.allocate(1)
    publish_chain(pool, first, list(range(8)))
    key = prefix_hashes(list(range(8)), 8, "")[0]
    assert not pool.publish(second[0], hash=key, parent=-1, salt="", tokens=range(8))
    pool.check([first, second])


def test_forget_takes_all_that_follows() -> None:
    pool = BlockPool(6, 8)
    tokens = list(range(24))
    chain = pool.allocate(3)
    publish_chain(pool, chain, tokens)
    branch = [*tokens[:8], *range(60, 68)]
    tail = pool.allocate(1)
    key = prefix_hashes(branch, 8, "")[1]
    pool.hold(chain[:1])
    assert pool.publish(tail[0], hash=key, parent=chain[0], salt="", tokens=branch[8:])
    pool.release(chain)
    pool.forget(chain[:1])
    assert find(pool, tokens) == [] and find(pool, branch) == []
    pool.check([[chain[0], tail[0]]])


def test_nothing_is_findable_when_switched_off() -> None:
    pool = BlockPool(2, 8, findable=False)
    blocks = pool.allocate(1)
    assert not pool.publish(blocks[0], hash=1, parent=-1, salt="", tokens=range(8))
    pool.release(blocks)
    pool.check()


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._users.__setitem__(0, 2),
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._idle.pop(next(iter(pool._idle))),
        lambda pool: pool._idle.__setitem__(next(iter(pool._idle)), pool._idle.pop(next(iter(pool._idle)))),
        lambda pool: pool._index.popitem(),
        lambda pool: pool._unpublish(next(iter(pool._contents))),
    ],
)
def test_check_catches_corruption(corrupt: object) -> None:
    pool = BlockPool(6, 8)
    chain = pool.allocate(3)
    publish_chain(pool, chain, list(range(24)))
    pool.release(chain)
    held = pool.allocate(1)
    pool.check([held])
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check([held])


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 5)), max_size=60))
def test_any_use_keeps_the_invariants(actions: list[tuple[int, int, int]]) -> None:
    """Sequences come with one of a few prompts, publish what they computed, and leave in any order."""
    pool = BlockPool(12, 8)
    tables: list[list[int]] = []
    for action, which, length in actions:
        if action < 2:
            tokens = [which % 3] * 8 + [which] * (8 * (length - 1))
            hashes = prefix_hashes(tokens, 8, "")
            found = pool.match(hashes, tokens, "")
            pool.hold(found)
            fresh = pool.allocate(length - len(found))
            if fresh is None:
                pool.release(found)
                continue
            blocks = found + fresh
            for i in range(len(found), length):
                content = tokens[i * 8 : (i + 1) * 8]
                if not pool.publish(blocks[i], hash=hashes[i], parent=blocks[i - 1] if i else -1, salt="", tokens=content):
                    break
            tables.append(blocks)
        elif tables:
            pool.release(tables.pop(which % len(tables)))
        pool.check(tables)
    for blocks in tables:
        pool.release(blocks)
    assert pool.available == 12


def test_a_block_is_evicted_as_quickly_from_a_cache_half_evicted() -> None:
    """What was evicted before costs nothing: a cache of a GPU has a hundred thousand blocks."""
    pool = BlockPool(40_000, 16)
    blocks = pool.allocate(pool.num_blocks)
    assert blocks is not None
    for i, block in enumerate(blocks):
        assert pool.publish(block, hash=i, parent=-1, salt="", tokens=[i] * 16)
    pool.release(blocks)

    def quickest() -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(50):
                pool.allocate(1)
            times.append(time.perf_counter() - begin)
        return min(times)

    first = quickest()
    assert pool.allocate(30_000) is not None
    assert quickest() < 4 * first
