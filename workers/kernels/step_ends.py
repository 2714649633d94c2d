"""The beginning and the end of a step in Triton. Before the layers: read the host's submission and look up the tokens of placeholders.
After them: sample tokens and report them to the host, on the device and with one read of the logits.

Tokens are sampled greedily or by plain temperature, the common cases. Owns the state that a step leaves so that the next one may need no
input of the host; and the kernels' form of :mod:`workers.sampling.definition`: the same noise bits, ties to the lowest id. The best
candidate of a sequence is three int32 words: the bits of its score, its id, and whether a logit is NaN or +inf. Must never sample for a
sequence with penalties, masks, top-k, top-p or min-p: the torch sampler does that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import early, enter
from workers.kernels.step_layout import HEADER_WORDS, NUMBER_MASK, Rings, SlotState
from workers.sampling.definition import MIX_A, MIX_B

#: Candidates that one program scores.
_CANDIDATES = 2048
#: Tokens that one program of :func:`resolve_placeholders` looks up, and words that :func:`take_submission` reads at a time.
_TOKENS = 128
_WORDS = 4096
_HEADER, _NUMBERS = tl.constexpr(HEADER_WORDS), tl.constexpr(NUMBER_MASK)
_MIX_A, _MIX_B = tl.constexpr(MIX_A), tl.constexpr(MIX_B)
_UNIT, _HALF_UNIT, _BELOW_ONE = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33), tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mix(x):
    """The 32-bit mixer of the definition on uint32 ``x``."""
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
def _take_submission(
    ring, memory, state, returned, taken, read, ENTRY: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Grid: one program. Host memory is read past all caches, which do not see the host's writes."""
    enter(EARLY)
    number = (tl.load(taken) + 1) & _NUMBERS
    entry = ring + (number % DEPTH) * ENTRY
    words = tl.load(entry, cache_modifier=".cv")
    updates = tl.load(entry + 1, cache_modifier=".cv")
    returns = tl.load(entry + 2, cache_modifier=".cv")
    step = tl.load(entry + 3, cache_modifier=".cv")
    span = tl.arange(0, SPAN)
    body = entry + _HEADER
    for begin in range(0, words, SPAN):
        mask = begin + span < words
        tl.store(memory + begin + span, tl.load(body + begin + span, mask=mask, other=0, cache_modifier=".cv"), mask=mask)
    body += (words + 3) // 4 * 4
    values = body + (updates + 3) // 4 * 4
    for begin in range(0, updates, SPAN):
        mask = begin + span < updates
        index = tl.load(body + begin + span, mask=mask, other=0, cache_modifier=".cv")
        tl.store(state + index, tl.load(values + begin + span, mask=mask, other=0, cache_modifier=".cv"), mask=mask)
    body = values + (updates + 3) // 4 * 4
    for begin in range(0, returns, SPAN):
        mask = begin + span < returns
        index = tl.load(body + begin + span, mask=mask, other=0, cache_modifier=".cv")
        tl.store(state + index, tl.load(returned + begin + span, mask=mask, other=0), mask=mask)
    tl.debug_barrier()  # all threads have read the number and the entry
    tl.store(taken, number)
    tl.store(taken + 1, step)
    tl.store(read, number)


def take_submission(rings: Rings, memory: Tensor, state: SlotState, returned: Tensor) -> None:
    """Take the next submission: write its step inputs to the beginning of ``memory`` int32, its slot updates into ``state``, and the tokens
    ``returned`` [m] int32 to the word indices that it names for them."""
    depth, words = rings.submissions.shape
    _take_submission[(1,)](
        rings.submissions, memory, state.words, returned, rings.taken, rings.read, ENTRY=words, DEPTH=depth, SPAN=_WORDS, **early(),
        num_warps=16,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _resolve_placeholders(out, tokens, slots, last, count, SPAN: tl.constexpr, EARLY: tl.constexpr):
    """Grid: one program for each SPAN tokens."""
    enter(EARLY)
    index = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    mask = index < count
    given = tl.load(tokens + index, mask=mask, other=0)
    found = tl.load(last + tl.load(slots + index, mask=mask, other=0), mask=mask & (given < 0), other=0)
    tl.store(out + index, tl.where(given < 0, found, given), mask=mask)
    tl.store(tokens + index, -1, mask=mask)


def resolve_placeholders(tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor:
    """[T] int32: ``tokens`` [T] int32, with the last token of ``slots`` [T] in place of each placeholder (a negative token).

    Afterwards all ``tokens`` are placeholders: what a step that repeats this one reads.
    """
    out, count = torch.empty_like(tokens), len(tokens)
    _resolve_placeholders[(triton.cdiv(count, _TOKENS),)](out, tokens, slots, state.tokens, count, SPAN=_TOKENS, **early(), num_warps=1)
    return out


@triton.jit(do_not_specialize=["start"])
def _best_candidates(best, logits, slots, seeds, temperatures, positions, vocab, start, SPAN: tl.constexpr, EARLY: tl.constexpr):
    """Grid: (parts of SPAN ids, sequences)."""
    enter(EARLY)
    part, row, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    ids = part * SPAN + tl.arange(0, SPAN)
    raw = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    broken = (raw != raw) | (raw == float("inf"))
    scores = tl.where(broken, float("-inf"), raw)
    temperature = tl.load(temperatures + slot)
    if temperature > 0.0:
        a = tl.load(seeds + 2 * slot).to(tl.uint32, bitcast=True)
        b = tl.load(seeds + 2 * slot + 1).to(tl.uint32, bitcast=True)
        k = _mix((tl.load(positions + row) + 1).to(tl.uint32) + b)
        bits = _mix(_mix((start + ids).to(tl.uint32) + k) ^ _mix(k ^ a))
        scores = tl.div_rn(scores, temperature) + _gumbel(bits)
    # argmax takes the first of equal scores: its id is the lowest.
    target = best + part * 3 * count + row
    tl.store(target, tl.max(scores, 0).to(tl.int32, bitcast=True))
    tl.store(target + count, start + part * SPAN + tl.argmax(scores, 0))
    tl.store(target + 2 * count, tl.max(broken.to(tl.int32), 0))


def best_candidates(logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor:
    """[n, 3, S] int32: the best candidate of each part of ``logits`` [S, vocab] (any float, -inf = never), parts in order of their ids.

    Args:
        slots: [S] int32, the slots of the sequences; ``state`` has their seeds and temperatures.
        positions: [S] int32 of the query tokens that these logits follow; the new tokens take the next positions.
        start: vocabulary id of the first column.
    """
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, _CANDIDATES)
    best = torch.empty(parts, 3, count, dtype=torch.int32, device=logits.device)
    _best_candidates[(parts, count)](
        best, logits, slots, state.seeds, state.temperatures, positions, vocab, start, SPAN=_CANDIDATES, **early(), num_warps=4
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["parts"])
def _choose_tokens(
    out, best, slots, positions, last, taken, parts, WIDTH: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, FINAL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The best of ``parts`` candidates of a sequence. FINAL: write its token (or -1) to the host's ring and to ``last``, and move its
    position on by one; else write a candidate to ``out``. Grid: one program a sequence."""
    enter(EARLY)
    row, count = tl.program_id(0), tl.num_programs(0)
    numbers = tl.arange(0, SPAN)
    mask = numbers < parts
    sources = best + numbers * 3 * count + row
    scores = tl.load(sources, mask=mask, other=0).to(tl.float32, bitcast=True)
    scores = tl.where(mask, scores, float("-inf"))
    chosen = numbers == tl.argmax(scores, 0)
    token = tl.sum(tl.where(chosen, tl.load(sources + count, mask=mask, other=0), 0), 0)
    broken = tl.max(tl.load(sources + 2 * count, mask=mask, other=0), 0)
    top = tl.max(scores, 0)
    if FINAL:
        token = tl.where((broken != 0) | (top == float("-inf")), -1, token)
        step = tl.load(taken + 1)
        tl.store(out + (step % DEPTH) * WIDTH + row, (step.to(tl.int64) << 32) | (token.to(tl.int64) & 0xFFFFFFFF))
        tl.store(last + tl.load(slots + row), tl.maximum(token, 0))
        position = tl.load(positions + row)
        tl.store(positions + row, tl.where(position < 0, position, position + 1))
    else:
        tl.store(out + row, top.to(tl.int32, bitcast=True))
        tl.store(out + count + row, token)
        tl.store(out + 2 * count + row, broken)


def merge_candidates(best: Tensor) -> Tensor:
    """[3, S] int32: the best of the candidates ``best`` [n, 3, S], for one message between ranks."""
    parts, words, count = best.shape
    out = torch.empty(words, count, dtype=torch.int32, device=best.device)
    span = triton.next_power_of_2(parts)
    _choose_tokens[(count,)](out, best, best, best, best, best, parts, WIDTH=0, DEPTH=1, SPAN=span, FINAL=False, **early(), num_warps=1)
    return out


def choose_tokens(best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, rings: Rings) -> None:
    """Complete the step: report the tokens [S] of the best candidates to the host; -1 where a logit is NaN or +inf, or none is finite.

    ``best`` [n, 3, S]: candidates in order of their ids. ``state`` keeps the tokens as the last ones of ``slots`` [S]; token 0 in place of
    -1, so that such a sequence continues with a valid token until the leader sees the fault. ``positions`` [S] go up by one; negative ones
    (padding) stay.
    """
    (parts, _, count), (depth, width) = best.shape, rings.completions.shape
    _choose_tokens[(count,)](
        rings.completions, best, slots, positions, state.tokens, rings.taken, parts, WIDTH=width, DEPTH=depth,
        SPAN=triton.next_power_of_2(parts), FINAL=True, **early(), num_warps=1,
    )  # fmt: skip
