"""A sum over the GPUs of one host, its addition to the residual and the norm after it, as one kernel.

Owns the memory through which rows are sent. Few rows are sent as words that carry the number of their round
(:mod:`workers.distributed.one_shot_allreduce`), which costs twice their bytes on the link and no fence. Many rows are sent unchanged, each
followed by a fence and a flag: a program sends its next row before it waits for the previous one, so the link stays busy.

Why a depth of four rounds is enough for many rows: in round k a program writes over what its peer read in round k - 4. It has seen the flag
of round k - 2, which the peer sent after that read: the peer sends round k - 2 before it waits for round k - 3, and after its round k - 4
is over. Each program waits only for the program of the same number on the other ranks. GPUs begin programs in order, although CUDA does not
promise it, so the first program that is not over can always go on; and there are few enough of them that an H100 should hold all at once.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from workers.distributed.one_shot_allreduce import PeerBuffer, exchange_and_sum
from workers.kernels.fused import empty_fp8_rows, store_norm
from workers.kernels.launch import early, enter
from workers.kernels.linear import Fp8Rows

#: Most rows that are sent as words with a round number; and by the number of ranks, the largest sums, bytes, for which that is faster than
#: flags, where it was measured: `python -m bench.collectives`.
WORD_ROWS = 64
WORD_BYTES = {2: 512 << 10}
#: Programs of a sum of many rows, the same number on every rank: two for each multiprocessor of the GPUs that this was measured on.
_PROGRAMS = 264
_DEPTH = tl.constexpr(4)


@triton.jit
def _add_and_norm(normed, scales, residual, before, total, row, offsets, weights, hidden, eps, mask, FP8: tl.constexpr):
    """Store ``before`` + ``total`` (fp32) as the row of ``residual``, and its norm. Rounds where separate operations would: the branch,
    then the sum."""
    after = (before.to(tl.float32) + total.to(before.dtype).to(tl.float32)).to(before.dtype)
    tl.store(residual + offsets, after, mask=mask)
    store_norm(normed, scales, row, offsets, after, weights, hidden, eps, mask, FP8)


@triton.jit
def _few(
    normed, scales, residual, x, weight, buffers, numbers, hidden, eps, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    FP8: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One bf16 row of at most SPAN words in each program. Grid: one program a row."""
    columns = tl.arange(0, 2 * SPAN)
    mask = columns < hidden
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    enter(EARLY)
    program = tl.program_id(0)
    number = tl.load(numbers + program) + 1
    row = program.to(tl.int64)
    words = tl.arange(0, SPAN)
    word_mask = words < hidden // 2
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + row * (hidden // 2) + words, mask=word_mask, other=0)
    offsets = row * hidden + columns
    before = tl.load(residual + offsets, mask=mask, other=0.0)  # loaded while the peers' words are on their way
    low, high = exchange_and_sum(mine, program * SPAN + words, word_mask, buffers, number, LIMIT, RANK, RANKS, True, SPAN)
    _add_and_norm(normed, scales, residual, before, tl.interleave(low, high), row, offsets, weights, hidden, eps, mask, FP8)
    tl.store(numbers + program, number)


@triton.jit
def _send(
    x, offsets, mask, buffers, flags, number, hidden, PROGRAMS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """Write this rank's row at ``offsets`` into the buffers of all other ranks, then the round's number into their ``flags``."""
    columns = tl.arange(0, SPAN)
    mine = tl.load(x + offsets, mask=mask, other=0.0)
    sender = RANK * PROGRAMS + tl.program_id(0)
    targets = ((number & (_DEPTH - 1)) * (RANKS * PROGRAMS) + sender).to(tl.int64) * hidden + columns
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            tl.store(tl.load(buffers + peer).to(tl.pointer_type(tl.bfloat16)) + targets, mine, mask=mask)
    # The release of one thread covers all writes and reads of the program: all its threads have reached the barrier.
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            tl.atomic_xchg(tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + sender, number, sem="release", scope="sys")


@triton.jit(do_not_specialize=["rows"])
def _many(
    normed, scales, residual, x, weight, buffers, flags, numbers, rows, hidden, eps, PROGRAMS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, FP8: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Bf16 rows: with n programs, program i takes the rows i, i + n, i + 2n, ..., one in each round. Grid: at most PROGRAMS programs.

    ``buffers``: addresses of the ranks' buffers, each [_DEPTH, RANKS, PROGRAMS, hidden] bf16; ``flags``: addresses of their flags, each
    [RANKS, PROGRAMS] int32, the number of the last round that was sent.
    """
    columns = tl.arange(0, SPAN)
    mask = columns < hidden
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    enter(EARLY)
    program, stride = tl.program_id(0), tl.num_programs(0)
    number = tl.load(numbers + program) + 1
    own_buffer = tl.load(buffers + RANK).to(tl.pointer_type(tl.bfloat16))
    own_flags = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + program
    row = program.to(tl.int64)
    _send(x, row * hidden + columns, mask, buffers, flags, number, hidden, PROGRAMS, RANK, RANKS, SPAN)
    while row < rows:
        offsets = row * hidden + columns
        if row + stride < rows:
            _send(x, offsets + stride * hidden, mask, buffers, flags, number + 1, hidden, PROGRAMS, RANK, RANKS, SPAN)
        mine = tl.load(x + offsets, mask=mask, other=0.0)
        before = tl.load(residual + offsets, mask=mask, other=0.0)
        total = tl.zeros((SPAN,), tl.float32)
        for peer in tl.static_range(RANKS):
            values = mine
            if peer != RANK:
                # The peer may be up to three rounds ahead.
                while tl.atomic_add(own_flags + peer * PROGRAMS, 0, sem="acquire", scope="sys") - number < 0:
                    pass
                sources = ((number & (_DEPTH - 1)) * (RANKS * PROGRAMS) + peer * PROGRAMS + program).to(tl.int64) * hidden + columns
                values = tl.load(own_buffer + sources, mask=mask, other=0.0, cache_modifier=".cg")
            total += values.to(tl.float32)
        _add_and_norm(normed, scales, residual, before, total, row, offsets, weights, hidden, eps, mask, FP8)
        row += stride
        number += 1
    tl.store(numbers + program, number - 1)


class AllReduceNorm:
    """Implements :class:`workers.distributed.group.FusedAllReduceNorm` for bf16 rows of ``hidden`` values: any number of rows between two
    ranks, few rows among more.

    ``word_bytes``: the largest sum that is sent as words with a round number, instead of the measured one. Every rank must make the same
    calls in the same order, into one stream at a time; a captured call counts when it is replayed.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, hidden: int, *, word_bytes: int | None = None) -> None:
        self._rank, self._ranks, self._hidden = dist.get_rank(group), dist.get_world_size(group), hidden
        word_bytes = WORD_BYTES.get(self._ranks) if word_bytes is None else word_bytes
        self._any, self._few = word_bytes is not None, WORD_ROWS
        self._span = triton.next_power_of_2(hidden)
        self._word_buffers = PeerBuffer(group, device, 2 * self._ranks * WORD_ROWS * (self._span // 2), torch.int64)
        self._few_numbers = torch.zeros(WORD_ROWS, dtype=torch.int32, device=device)
        if word_bytes is not None:
            self._few = min(word_bytes // (2 * hidden), WORD_ROWS)
            self._row_buffers = PeerBuffer(group, device, _DEPTH.value * self._ranks * _PROGRAMS * hidden, torch.bfloat16)
            self._flags = PeerBuffer(group, device, self._ranks * _PROGRAMS, torch.int32)
            self._many_numbers = torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)

    def supports(self, branch: Tensor) -> bool:
        return branch.dtype == torch.bfloat16 and (self._any or len(branch) <= self._few)

    def __call__(self, residual: Tensor, branch: Tensor, weight: Tensor, eps: float, *, fp8: bool) -> Tensor | Fp8Rows:
        rows = len(residual)
        found: Tensor | Fp8Rows = empty_fp8_rows(rows, self._hidden, residual.device) if fp8 else torch.empty_like(residual)
        values, scales = (found.values, found.scales) if isinstance(found, Fp8Rows) else (found, found)
        if rows <= self._few:
            _few[(rows,)](
                values, scales, residual, branch, weight, self._word_buffers.addresses, self._few_numbers, self._hidden, eps,
                LIMIT=WORD_ROWS * (self._span // 2), RANK=self._rank, RANKS=self._ranks, FP8=fp8, SPAN=self._span // 2,
                **early(), num_warps=min(max(self._span // 512, 1), 16),
            )  # fmt: skip
        else:
            _many[(min(rows, _PROGRAMS),)](
                values, scales, residual, branch, weight, self._row_buffers.addresses, self._flags.addresses, self._many_numbers, rows,
                self._hidden, eps, PROGRAMS=_PROGRAMS, RANK=self._rank, RANKS=self._ranks, FP8=fp8, SPAN=self._span,
                **early(), num_warps=min(max(self._span // 512, 1), 8),
            )  # fmt: skip
        return found
