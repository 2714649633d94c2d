"""What a GPU step is cut into, checked without a GPU: every query token and every key is covered once, within the shape's capacity."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.support.examples import examples
from workers.kernels.step_layout import (
    SEGMENT_STEP,
    SPLIT_PROGRAMS,
    DeviceLayout,
    Heads,
    LayoutShape,
    Paging,
    decode_shape,
    fill_layout,
    step_shape,
    view_layout,
)

HEADS = st.builds(lambda kv, group: Heads(kv * group, kv), st.integers(1, 8), st.integers(1, 9))
DECODES = st.lists(st.integers(0, 20_000), min_size=1, max_size=60)


def planned(
    shape: LayoutShape, heads: Heads, slots: list[int], starts: list[int], lengths: list[int], segment: int | None = None
) -> DeviceLayout:
    packed = np.full(shape.size, 77, np.int32)
    fill_layout(shape, packed, *(np.array(column, np.int32) for column in (slots, starts, lengths)), heads, segment)
    return view_layout(shape, torch.from_numpy(packed), Paging.over(torch.zeros(max(slots) + 1, 4, dtype=torch.int32), heads))


def cuts(layout: DeviceLayout) -> dict[int, list[tuple[int, int]]]:
    """Each decoding sequence's (begin, end) of parts."""
    found: dict[int, list[tuple[int, int]]] = {}
    for number, (sequence, slot, begin, bound, first, count, *_) in enumerate(layout.parts.tolist()):
        if sequence >= 0:
            assert slot == layout.slots[sequence] and first <= number < first + count
            assert number == first + len(found.setdefault(sequence, []))
            found[sequence].append((begin, min(bound, int(layout.positions[sequence]) + 1)))
    for sequence, parts in found.items():
        assert len(parts) == next(count for other, _, _, _, _, count, *_ in layout.parts.tolist() if other == sequence)
    return found


@settings(max_examples=examples(60), deadline=None)
@given(HEADS, DECODES, st.integers(0, 5), st.integers(0, 500))
def test_parts_cover_each_context_once(heads: Heads, contexts: list[int], padding: int, steps: int) -> None:
    """At once, and ``steps`` steps later, when nothing but the positions was raised."""
    sequences = len(contexts)
    shape = decode_shape(sequences + padding, heads)
    layout = planned(shape, heads, [(7 * i) % 64 for i in range(sequences)], contexts, [1] * sequences)
    assert layout.positions.tolist() == contexts + [-1] * padding
    layout.positions[:sequences] += steps
    assert layout.slots.tolist() == [(7 * i) % 64 for i in range(sequences)] + [0] * padding
    found = cuts(layout)
    assert sorted(found) == list(range(sequences + padding))
    for sequence, parts in found.items():
        context = contexts[sequence] + steps + 1 if sequence < sequences else 0
        assert parts[0][0] == 0 and parts[-1][1] == context
        assert all(before[1] == after[0] for before, after in pairwise(parts))
        assert all(begin < end for begin, end in parts) or context == 0


@pytest.mark.parametrize("sequences", [1, 8, 64, 256])
def test_long_contexts_are_spread_over_the_whole_gpu(sequences: int) -> None:
    heads = Heads(32, 8)
    parts = [
        part
        for parts in cuts(planned(decode_shape(sequences, heads), heads, [0] * sequences, [65_000] * sequences, [1] * sequences)).values()
        for part in parts
    ]
    assert len(parts) * heads.kv >= SPLIT_PROGRAMS / 2 or all(end - begin <= SEGMENT_STEP for begin, end in parts)


def test_one_long_sequence_among_short_ones_is_cut() -> None:
    heads = Heads(32, 8)
    found = cuts(planned(decode_shape(200, heads), heads, [0] * 200, [100] * 199 + [100_000], [1] * 200))
    assert all(len(found[sequence]) == 1 for sequence in range(199)) and len(found[199]) > 40


def test_a_given_segment_makes_cuts_independent_of_the_batch() -> None:
    heads = Heads(4, 2)
    shape = LayoutShape(tokens=4, parts=40, tiles=0)
    alone = cuts(planned(shape, heads, [0], [3000], [1], segment=512))[0]
    among = cuts(planned(shape, heads, [0, 1, 2, 3], [10, 3000, 4000, 0], [1] * 4, segment=512))[1]
    assert alone == among and len(alone) == 6


@settings(max_examples=examples(60), deadline=None)
@given(HEADS, st.lists(st.integers(0, 3000), max_size=20), st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 400)), max_size=6))
def test_every_query_token_is_in_one_part_or_tile(heads: Heads, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    starts, lengths = [*decodes, *(start for start, _ in chunks)], [*([1] * len(decodes)), *(length for _, length in chunks)]
    if not starts:
        return
    shape = step_shape(np.array(lengths, np.int32), heads)
    layout = planned(shape, heads, list(range(len(starts))), starts, lengths)
    covered = sorted({sequence for sequence, *_ in layout.parts.tolist() if sequence >= 0})
    ends = []
    for first, count, slot, start in layout.tiles.tolist():
        assert 1 <= count <= heads.tile_tokens
        tokens = slice(first, first + count)
        covered += range(first, first + count)
        assert set(layout.slots[tokens].tolist()) == {slot}
        assert layout.positions[tokens].tolist() == list(range(start, start + count))
        ends.append(start + count)
    assert sorted(covered) == list(range(sum(lengths)))
    assert ends == sorted(ends, reverse=True), "tiles with the most to read come first"


def test_columns_are_aligned_and_disjoint() -> None:
    shape = LayoutShape(tokens=5, parts=3, tiles=2)
    assert all(span.start % 4 == 0 for span in shape.spans)
    assert all(before.stop <= after.start for before, after in pairwise(shape.spans))
    assert shape.spans[-1].stop <= shape.size


@pytest.mark.parametrize(
    ("shape", "lengths"), [(LayoutShape(tokens=2, parts=9, tiles=0), [1, 1, 1]), (LayoutShape(tokens=9, parts=9, tiles=0), [1, 4])]
)
def test_a_step_that_does_not_fit_is_refused(shape: LayoutShape, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="not fit a layout"):
        planned(shape, Heads(2, 1), [0] * len(lengths), [0] * len(lengths), lengths)
    with pytest.raises(ValueError, match="words of int32"):
        view_layout(shape, torch.zeros(shape.size + 1, dtype=torch.int32), Paging.over(torch.zeros(1, 1, dtype=torch.int32), Heads(2, 1)))
