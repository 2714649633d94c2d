"""The invariants of a scheduler's state: every sequence is in one place, and every slot and block is accounted for.

Owns nothing and changes nothing. Checked when an engine is idle, and after every step of the property tests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from itertools import chain

from workers.scheduler.block_pool import BlockPool
from workers.scheduler.in_flight import InFlightStep
from workers.scheduler.sequence import Queue, Sequence
from workers.scheduler.step_plan import PLACEHOLDER


def check_invariants(
    sequences: Mapping[int, Sequence],
    steps: deque[InFlightStep],
    pool: BlockPool,
    *,
    waiting: Queue,
    prefills: Queue,
    decodes: Queue,
    paused: Queue,
    free_slots: Collection[int],
    slot_count: int,
) -> None:
    """``sequences``: the live ones by id; ``steps``: in flight, oldest first; ``slot_count``: slots in all.

    Raises AssertionError naming the first invariant broken.
    """
    queued = [*waiting, *prefills, *decodes, *paused]
    everyone = list({id(seq): seq for seq in chain(queued, *(step.sequences for step in steps))}.values())
    live = [seq for seq in everyone if not seq.finished]
    assert len({id(seq) for seq in queued}) == len(queued), "a sequence is in two queues"
    assert all(seq.queue is queue for queue in (waiting, prefills, decodes, paused) for seq in queue), "a sequence names another queue"
    assert len(live) == len(sequences) and {seq.id for seq in live} == sequences.keys(), "a live sequence is in no queue and no step"
    assert not any(seq.finished for seq in queued), "a finished sequence is in a queue"
    _check_steps(steps, everyone)
    assert all(seq.slot < 0 and seq.credit > 0 for seq in waiting), "a waiting sequence has a slot or no credit"
    ready = (seq.pending == 1 or (seq.pending == 0 and seq.in_flight) for seq in decodes)
    assert all(ready) and all(seq.slot >= 0 and seq.credit > 0 for seq in decodes), "a decoding sequence is not ready"
    assert not any(seq.nothing_to_emit for seq in decodes), "a sequence with nothing to emit decodes"
    assert all(seq.slot >= 0 and seq.credit > 0 for seq in prefills), "a prefilling sequence is not ready"
    assert all(seq.credit <= 0 for seq in paused), "a paused sequence has credit"
    for queue in (waiting, prefills):
        assert [seq.arrival for seq in queue] == sorted(seq.arrival for seq in queue), "a queue is out of the order of arrival"
    for seq in live:
        assert 0 <= seq.computed < seq.known <= len(seq.tokens), "a sequence is computed beyond what is known"
        assert seq.tokens[-1] != PLACEHOLDER, "a placeholder is taken for a token"
        assert seq.plain_until < seq.max_len, "the last token is taken for a plain one"
        published = seq.prefix.publish_at > seq.prefix.eager_until
        assert not seq.plain_until or published, "a block of the prompt is not published when it is computed"
    for seq in everyone:
        assert (seq.slot >= 0) == bool(seq.blocks), "a sequence has a slot without blocks or blocks without a slot"
        assert seq.block_capacity == len(seq.blocks) * pool.block_size, "a sequence's block table is miscounted"
        assert seq.scheduled <= seq.block_capacity, "a sequence's block table is too short"
    used = [seq.slot for seq in everyone if seq.slot >= 0]
    assert sorted([*used, *free_slots]) == list(range(slot_count)), "a slot is lost or shared"
    pool.check([seq.blocks for seq in everyone])


def _check_steps(steps: deque[InFlightStep], everyone: Collection[Sequence]) -> None:
    shares = Counter(id(seq) for step in steps for seq in step.sequences)
    tokens: Counter[int] = Counter()
    for step in steps:
        for seq, count in zip(step.sequences, step.counts, strict=True):
            tokens[id(seq)] += count
    assert all(seq.in_flight == tokens[id(seq)] for seq in everyone), "tokens in flight are miscounted"
    # Only sequences of the oldest step may also be in another place, if they are scheduled early.
    oldest = {id(seq) for seq in steps[0].sequences} if steps and steps[0].early else set()
    assert not any(step.early for step in list(steps)[1:]), (
        "a step's sequences are scheduled early before the result of the step before it is there"
    )
    assert all(seq.queue is None for seq in everyone if seq.in_flight and id(seq) not in oldest), "a sequence in flight can be chosen again"
    assert all(count == 1 or seq in oldest for seq, count in shares.items()), "a sequence is in two steps that are not in order"
