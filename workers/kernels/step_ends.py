"""Both ends of a step in Triton: what the host has submitted taken and guesses looked up before the layers, tokens chosen and told after
them, greedy and by plain temperature, the common case, without leaving the device or reading the logits twice.

Owns what a step leaves behind so that the next one may need nothing from the host; and the kernels' form of
:mod:`workers.sampling.definition`' definition: the same noise bits, ties to the lowest id. A row's best candidate is three int32 words:
bits of the score, id, and whether a logit is NaN or infinite. Must never take a row with penalties, masks, top-k, top-p or min-p: those are
torch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.step_layout import HEAD_WORDS, NUMBER_MASK, Rings, SlotState
from workers.sampling.definition import MIX_A, MIX_B

#: Candidates that one program scores.
_CANDIDATES = 2048
#: Tokens that one program of :func:`known` looks up, and words that :func:`take` reads at a time.
_TOKENS = 128
_WORDS = 4096
_HEAD, _NUMBERS = tl.constexpr(HEAD_WORDS), tl.constexpr(NUMBER_MASK)
_MIX_A, _MIX_B = tl.constexpr(MIX_A), tl.constexpr(MIX_B)
_UNIT, _HALF_UNIT, _BELOW_ONE = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33), tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= _MIX_A
    x ^= x >> 15
    x *= _MIX_B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(bits):
    """-log(-log1p(-w)) of uniform 32-bit ``bits``; log1p as log(u) * x / (u - 1), which is exact to a few ulps where u = 1 + x rounds."""
    w = tl.minimum(bits.to(tl.float32) * _UNIT + _HALF_UNIT, _BELOW_ONE)
    u = 1.0 - w
    gap = 1.0 - u
    return -tl.log(tl.where(gap == 0.0, w, -tl.log(u) * (w / tl.where(gap == 0.0, 1.0, gap))))


@triton.jit
def _take(ring, memory, state, returned, turn, read, ENTRY: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr):
    """One program. The host's memory is read past all caches, which know nothing of its writes."""
    enter(EARLY)
    mine = (tl.load(turn) + 1) & _NUMBERS
    entry = ring + (mine % DEPTH) * ENTRY
    words = tl.load(entry, cache_modifier=".cv")
    news = tl.load(entry + 1, cache_modifier=".cv")
    returns = tl.load(entry + 2, cache_modifier=".cv")
    step = tl.load(entry + 3, cache_modifier=".cv")
    span = tl.arange(0, SPAN)
    body = entry + _HEAD
    for begin in range(0, words, SPAN):
        there = begin + span < words
        tl.store(memory + begin + span, tl.load(body + begin + span, mask=there, other=0, cache_modifier=".cv"), mask=there)
    body += (words + 3) // 4 * 4
    values = body + (news + 3) // 4 * 4
    for begin in range(0, news, SPAN):
        there = begin + span < news
        place = tl.load(body + begin + span, mask=there, other=0, cache_modifier=".cv")
        tl.store(state + place, tl.load(values + begin + span, mask=there, other=0, cache_modifier=".cv"), mask=there)
    body = values + (news + 3) // 4 * 4
    for begin in range(0, returns, SPAN):
        there = begin + span < returns
        place = tl.load(body + begin + span, mask=there, other=0, cache_modifier=".cv")
        tl.store(state + place, tl.load(returned + begin + span, mask=there, other=0), mask=there)
    tl.debug_barrier()  # all threads have read their turn and the entry
    tl.store(turn, mine)
    tl.store(turn + 1, step)
    tl.store(read, mine)


def take(rings: Rings, memory: Tensor, state: SlotState, returned: Tensor) -> None:
    """Take the next submission: write its inbox to the beginning of ``memory`` int32, and its news into ``state``, of which the last get
    ``returned`` int32, one after the other."""
    depth, words = rings.submissions.shape
    _take[(1,)](
        rings.submissions, memory, state.words, returned, rings.turn, rings.read, ENTRY=words, DEPTH=depth, SPAN=_WORDS, **early(),
        num_warps=16,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _known(out, tokens, slots, last, count, SPAN: tl.constexpr, EARLY: tl.constexpr):
    enter(EARLY)
    places = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    there = places < count
    given = tl.load(tokens + places, mask=there, other=0)
    found = tl.load(last + tl.load(slots + places, mask=there, other=0), mask=there & (given < 0), other=0)
    tl.store(out + places, tl.where(given < 0, found, given), mask=there)
    tl.store(tokens + places, -1, mask=there)


def known(tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor:
    """``tokens`` [T] int32 of rows in ``slots`` [T], the slot's last one for each that is negative; as all of them are afterwards."""
    out, count = torch.empty_like(tokens), len(tokens)
    _known[(triton.cdiv(count, _TOKENS),)](out, tokens, slots, state.tokens, count, SPAN=_TOKENS, **early(), num_warps=1)
    return out


@triton.jit(do_not_specialize=["start"])
def _candidates(best, logits, slots, seeds, temperatures, positions, rows, start, SPAN: tl.constexpr, EARLY: tl.constexpr):
    enter(EARLY)
    part, row, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    ids = part * SPAN + tl.arange(0, SPAN)
    raw = tl.load(logits + row.to(tl.int64) * rows + ids, mask=ids < rows, other=float("-inf")).to(tl.float32)
    broken = (raw != raw) | (raw == float("inf"))
    scores = tl.where(broken, float("-inf"), raw)
    temperature = tl.load(temperatures + slot)
    if temperature > 0.0:
        a = tl.load(seeds + 2 * slot).to(tl.uint32, bitcast=True)
        b = tl.load(seeds + 2 * slot + 1).to(tl.uint32, bitcast=True)
        k = _mix((tl.load(positions + row) + 1).to(tl.uint32) + b)
        bits = _mix(_mix((start + ids).to(tl.uint32) + k) ^ _mix(k ^ a))
        scores = tl.div_rn(scores, temperature) + _gumbel(bits)
    # Of equal scores the first: its id is the lowest.
    line = best + part * 3 * count + row
    tl.store(line, tl.max(scores, 0).to(tl.int32, bitcast=True))
    tl.store(line + count, start + part * SPAN + tl.argmax(scores, 0))
    tl.store(line + 2 * count, tl.max(broken.to(tl.int32), 0))


def candidates(logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor:
    """[n, 3, S] int32: the best candidate of each part of ``logits`` [S, rows] (any float, -inf = never), parts in order of their ids.

    Args:
        slots: [S] int32, where ``state`` has the rows' seeds and temperatures, 0 = greedy.
        positions: [S] int32 of the query tokens that these logits follow; the new tokens take the next ones.
        start: vocabulary id of the first column.
    """
    count, rows = logits.shape
    parts = triton.cdiv(rows, _CANDIDATES)
    best = torch.empty(parts, 3, count, dtype=torch.int32, device=logits.device)
    _candidates[(parts, count)](
        best, logits, slots, state.seeds, state.temperatures, positions, rows, start, SPAN=_CANDIDATES, **early(), num_warps=4
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["parts"])
def _winners(
    out, best, slots, positions, last, turn, parts, WIDTH: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, FINAL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The best of ``parts`` candidates of one row. FINAL: the token, or -1, told to the host, which is also remembered, and a step further;
    else a candidate."""
    enter(EARLY)
    row, count = tl.program_id(0), tl.num_programs(0)
    numbers = tl.arange(0, SPAN)
    there = numbers < parts
    lines = best + numbers * 3 * count + row
    scores = tl.load(lines, mask=there, other=0).to(tl.float32, bitcast=True)
    scores = tl.where(there, scores, float("-inf"))
    taken = numbers == tl.argmax(scores, 0)
    token = tl.sum(tl.where(taken, tl.load(lines + count, mask=there, other=0), 0), 0)
    broken = tl.max(tl.load(lines + 2 * count, mask=there, other=0), 0)
    top = tl.max(scores, 0)
    if FINAL:
        token = tl.where((broken != 0) | (top == float("-inf")), -1, token)
        step = tl.load(turn + 1)
        tl.store(out + (step % DEPTH) * WIDTH + row, (step.to(tl.int64) << 32) | (token.to(tl.int64) & 0xFFFFFFFF))
        tl.store(last + tl.load(slots + row), tl.maximum(token, 0))
        position = tl.load(positions + row)
        tl.store(positions + row, tl.where(position < 0, position, position + 1))
    else:
        tl.store(out + row, top.to(tl.int32, bitcast=True))
        tl.store(out + count + row, token)
        tl.store(out + 2 * count + row, broken)


def merged(best: Tensor) -> Tensor:
    """[3, S]: the best of ``best`` [n, 3, S], for one message between ranks."""
    parts, words, count = best.shape
    out = torch.empty(words, count, dtype=torch.int32, device=best.device)
    span = triton.next_power_of_2(parts)
    _winners[(count,)](out, best, best, best, best, best, parts, WIDTH=0, DEPTH=1, SPAN=span, FINAL=False, **early(), num_warps=1)
    return out


def winners(best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, rings: Rings) -> None:
    """Complete the step: tokens [S] from candidates ``best`` [n, 3, S] in order of their ids; -1 where a logit is NaN or +inf, or none is
    finite. ``state`` remembers them for ``slots`` [S], 0 for -1: such a row goes on, until its fault is seen, from a token that exists.
    ``positions`` [S] are one further afterwards, negative ones stay."""
    (parts, _, count), (depth, width) = best.shape, rings.completions.shape
    _winners[(count,)](
        rings.completions, best, slots, positions, state.tokens, rings.turn, parts, WIDTH=width, DEPTH=depth,
        SPAN=triton.next_power_of_2(parts), FINAL=True, **early(), num_warps=1,
    )  # fmt: skip
