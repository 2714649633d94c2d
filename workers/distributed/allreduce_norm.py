"""A sum over the GPUs of one host, its addition to the residual and the norm after it, as one kernel.

Owns the memory through which rows travel. Few rows go as words that carry their turn (:mod:`workers.distributed.one_shot_allreduce`), which
costs twice their bytes on the link and no fence. Many rows go as they are, a fence and a flag behind each: a program sends its next row
before it waits for the one before, so the link has work meanwhile.

Why four sides are enough for many rows: a program writes turn k over what the other read in turn k - 4. It has seen the flag of turn
k - 2, which the other sent after that reading: there, turn k - 2 is sent before turn k - 3 is waited for, and after turn k - 4 is over.
Each program waits for its like on the other ranks alone. GPUs begin programs in order, which CUDA does not promise, so the first that is
not over can always go on; there are few enough that an H100 is meant to hold all at once.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from workers.distributed.one_shot_allreduce import Mapped, meet
from workers.kernels.fused import empty_fp8_rows, store_norm
from workers.kernels.launch import early, enter
from workers.kernels.linear import Fp8Rows

#: Most rows whose words carry their turn; and by the number of ranks, the largest sums, bytes, for which that is quicker than flags, where
#: these were measured: `python -m bench.collectives`.
WORD_ROWS = 64
WORD_BYTES = {2: 512 << 10}
#: Programs of a sum of many rows, the same on every rank: two for each multiprocessor of the GPUs that this was measured on.
_PROGRAMS = 264
_SIDES = tl.constexpr(4)


@triton.jit
def _add_and_norm(normed, scales, residual, before, total, row, line, rates, hidden, eps, within, FP8: tl.constexpr):
    """``residual``'s row, which was ``before``, += ``total``, fp32, and the norm of that. Rounded where it is without this kernel: the
    branch, then the sum."""
    after = (before.to(tl.float32) + total.to(before.dtype).to(tl.float32)).to(before.dtype)
    tl.store(residual + line, after, mask=within)
    store_norm(normed, scales, row, line, after, rates, hidden, eps, within, FP8)


@triton.jit
def _few(
    normed, scales, residual, x, weight, inboxes, turns, hidden, eps, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    FP8: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of bf16 a program, SPAN words of it."""
    columns = tl.arange(0, 2 * SPAN)
    within = columns < hidden
    rates = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    enter(EARLY)
    program = tl.program_id(0)
    turn = tl.load(turns + program) + 1
    row = program.to(tl.int64)
    place = tl.arange(0, SPAN)
    there = place < hidden // 2
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + row * (hidden // 2) + place, mask=there, other=0)
    line = row * hidden + columns
    before = tl.load(residual + line, mask=within, other=0.0)  # comes while the others' words do
    low, high = meet(mine, program * SPAN + place, there, inboxes, turn, LIMIT, RANK, RANKS, True, SPAN)
    _add_and_norm(normed, scales, residual, before, tl.interleave(low, high), row, line, rates, hidden, eps, within, FP8)
    tl.store(turns + program, turn)


@triton.jit
def _send(x, line, within, rows, flags, turn, hidden, PROGRAMS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SPAN: tl.constexpr):
    """This rank's row at ``line`` into all other ranks' ``rows``, then its turn into their ``flags``."""
    columns = tl.arange(0, SPAN)
    mine = tl.load(x + line, mask=within, other=0.0)
    place = RANK * PROGRAMS + tl.program_id(0)
    there = ((turn & (_SIDES - 1)) * (RANKS * PROGRAMS) + place).to(tl.int64) * hidden + columns
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            tl.store(tl.load(rows + peer).to(tl.pointer_type(tl.bfloat16)) + there, mine, mask=within)
    # One thread's release counts for the whole program's writes, and for what it read, once all have come here.
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            tl.atomic_xchg(tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + place, turn, sem="release", scope="sys")


@triton.jit(do_not_specialize=["rows"])
def _many(
    normed, scales, residual, x, weight, inboxes, flags, turns, rows, hidden, eps, PROGRAMS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, FP8: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Every program takes each of so many rows of bf16 as there are programs, one a turn. Inboxes are [_SIDES, RANKS, PROGRAMS, hidden]
    rows, flags [RANKS, PROGRAMS] turns."""
    columns = tl.arange(0, SPAN)
    within = columns < hidden
    rates = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    enter(EARLY)
    program, stride = tl.program_id(0), tl.num_programs(0)
    turn = tl.load(turns + program) + 1
    mine = tl.load(inboxes + RANK).to(tl.pointer_type(tl.bfloat16))
    told = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + program
    row = program.to(tl.int64)
    _send(x, row * hidden + columns, within, inboxes, flags, turn, hidden, PROGRAMS, RANK, RANKS, SPAN)
    while row < rows:
        line = row * hidden + columns
        if row + stride < rows:
            _send(x, line + stride * hidden, within, inboxes, flags, turn + 1, hidden, PROGRAMS, RANK, RANKS, SPAN)
        own = tl.load(x + line, mask=within, other=0.0)
        before = tl.load(residual + line, mask=within, other=0.0)
        total = tl.zeros((SPAN,), tl.float32)
        for peer in tl.static_range(RANKS):
            theirs = own
            if peer != RANK:
                # The other may be ahead by three turns.
                while tl.atomic_add(told + peer * PROGRAMS, 0, sem="acquire", scope="sys") - turn < 0:
                    pass
                place = ((turn & (_SIDES - 1)) * (RANKS * PROGRAMS) + peer * PROGRAMS + program).to(tl.int64) * hidden + columns
                theirs = tl.load(mine + place, mask=within, other=0.0, cache_modifier=".cg")
            total += theirs.to(tl.float32)
        _add_and_norm(normed, scales, residual, before, total, row, line, rates, hidden, eps, within, FP8)
        row += stride
        turn += 1
    tl.store(turns + program, turn - 1)


class AllReduceNorm:
    """:class:`workers.distributed.group.AllReduceNorm` of bf16 rows of ``hidden`` values: any number of them between two ranks, few among
    more.

    ``word_bytes``: the largest sum whose words carry their turn, if not what was measured. Every rank must make the same calls in the same
    order, into one stream at a time; a captured call counts when it is replayed.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, hidden: int, *, word_bytes: int | None = None) -> None:
        self._rank, self._ranks, self._hidden = dist.get_rank(group), dist.get_world_size(group), hidden
        word_bytes = WORD_BYTES.get(self._ranks) if word_bytes is None else word_bytes
        self._any, self._few = word_bytes is not None, WORD_ROWS
        self._span = triton.next_power_of_2(hidden)
        self._words = Mapped(group, device, 2 * self._ranks * WORD_ROWS * (self._span // 2), torch.int64)
        self._turns = torch.zeros(WORD_ROWS, dtype=torch.int32, device=device)
        if word_bytes is not None:
            self._few = min(word_bytes // (2 * hidden), WORD_ROWS)
            self._rows = Mapped(group, device, _SIDES.value * self._ranks * _PROGRAMS * hidden, torch.bfloat16)
            self._flags = Mapped(group, device, self._ranks * _PROGRAMS, torch.int32)
            self._many_turns = torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)

    def supports(self, branch: Tensor) -> bool:
        return branch.dtype == torch.bfloat16 and (self._any or len(branch) <= self._few)

    def __call__(self, residual: Tensor, branch: Tensor, weight: Tensor, eps: float, *, fp8: bool) -> Tensor | Fp8Rows:
        rows = len(residual)
        found: Tensor | Fp8Rows = empty_fp8_rows(rows, self._hidden, residual.device) if fp8 else torch.empty_like(residual)
        values, scales = (found.values, found.scales) if isinstance(found, Fp8Rows) else (found, found)
        if rows <= self._few:
            _few[(rows,)](
                values, scales, residual, branch, weight, self._words.addresses, self._turns, self._hidden, eps,
                LIMIT=WORD_ROWS * (self._span // 2), RANK=self._rank, RANKS=self._ranks, FP8=fp8, SPAN=self._span // 2,
                **early(), num_warps=min(max(self._span // 512, 1), 16),
            )  # fmt: skip
        else:
            _many[(min(rows, _PROGRAMS),)](
                values, scales, residual, branch, weight, self._rows.addresses, self._flags.addresses, self._many_turns, rows, self._hidden,
                eps, PROGRAMS=_PROGRAMS, RANK=self._rank, RANKS=self._ranks, FP8=fp8, SPAN=self._span,
                **early(), num_warps=min(max(self._span // 512, 1), 8),
            )  # fmt: skip
        return found
