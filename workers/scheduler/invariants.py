"""The proof that a batch's state is sound: every row in its place, every slot and block accounted for.

Owns nothing and changes nothing. Run when an engine is idle, and after every step of the property tests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from itertools import chain

from workers.scheduler.block_pool import BlockPool
from workers.scheduler.in_flight import InFlightStep
from workers.scheduler.sequence import Queue, Sequence
from workers.scheduler.step_plan import GUESS


def prove(
    rows: Mapping[int, Sequence],
    flights: deque[InFlightStep],
    pool: BlockPool,
    *,
    waiting: Queue,
    prefills: Queue,
    decodes: Queue,
    paused: Queue,
    slots: Collection[int],
    slot_count: int,
) -> None:
    """``rows``: the live ones by id; ``slots``: the free ones of ``slot_count``. Raises AssertionError naming the first invariant
    broken."""
    queued = [*waiting, *prefills, *decodes, *paused]
    everyone = list({id(row): row for row in chain(queued, *(flight.rows for flight in flights))}.values())
    live = [row for row in everyone if not row.over]
    assert len({id(row) for row in queued}) == len(queued), "a row is in two places"
    assert len(live) == len(rows) and {row.id for row in live} == rows.keys(), "a live row is in no place"
    assert not any(row.over for row in queued), "a row that is over waits for something"
    _prove_flights(flights, queued, everyone)
    assert all(row.slot < 0 and row.credit > 0 for row in waiting), "a waiting row has a slot or no credit"
    ready = (row.pending == 1 or (row.pending == 0 and row.airborne) for row in decodes)
    assert all(ready) and all(row.slot >= 0 and row.credit > 0 for row in decodes), "a decoding row is not ready"
    assert not any(row.spent for row in decodes), "a row with nothing to emit decodes"
    assert all(row.slot >= 0 and row.credit > 0 for row in prefills), "a prefilling row is not ready"
    assert all(row.credit <= 0 for row in paused), "a paused row has credit"
    for queue in (waiting, prefills):
        assert [row.order for row in queue] == sorted(row.order for row in queue), "a queue is out of admission order"
    for row in live:
        assert 0 <= row.computed < row.known <= len(row.tokens), "a row is computed beyond what is known"
        assert row.tokens[-1] != GUESS, "a guess is taken for a fact"
        assert row.calm <= row.last and (not row.calm or row.publish_at > row.opened), "a row's token is taken for one like all"
    for row in everyone:
        assert (row.slot >= 0) == bool(row.blocks), "a row has a slot without blocks or blocks without a slot"
        assert row.room == len(row.blocks) * pool.block_size and row.issued <= row.room, "a row's table is too short"
    taken = [row.slot for row in everyone if row.slot >= 0]
    assert sorted([*taken, *slots]) == list(range(slot_count)), "a slot is lost or shared"
    pool.check([row.blocks for row in everyone])


def _prove_flights(flights: deque[InFlightStep], queued: Collection[Sequence], everyone: Collection[Sequence]) -> None:
    plans = Counter(id(row) for flight in flights for row in flight.rows)
    tokens: Counter[int] = Counter()
    for flight in flights:
        for row, count in zip(flight.rows, flight.counts, strict=True):
            tokens[id(row)] += count
    assert all(row.airborne == tokens[id(row)] for row in everyone), "tokens in flight are miscounted"
    # Only rows of the oldest plan, once it is left, may be somewhere else too.
    eldest = {id(row) for row in flights[0].rows} if flights and flights[0].left else set()
    assert not any(flight.left for flight in list(flights)[1:]), "a plan is left before the one before it has landed"
    assert all(row.home is None for row in everyone if row.airborne and id(row) not in eldest), "a row in flight can be chosen again"
    assert all(count == 1 or row in eldest for row, count in plans.items()), "a row is in two plans that are not in order"
