"""Small sums over the GPUs of one host: every rank writes its words straight into the others' memory, each with its turn beside it.

Owns the inboxes that the ranks of one group map, and how often each of its programs has run. A word and its turn travel as one 8-byte
write, so there is neither a fence nor a flag to wait for after the data: what it costs is one way over the link. Sums are made in rank
order in fp32 and rounded once, so every rank has the same bits.

A kernel waits for the others' words without a bound of its own, as NCCL's do. What bounds it is the leader's watchdog, which gives up a
step that makes no progress, and the gang's end, which all its ranks share.

Why two sides of an inbox are enough: a program writes side k & 1 in its k-th turn, over what the others read in their turn k - 2. It has
seen their words of turn k - 1, which they wrote after the kernel of turn k - 2 was over.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
import triton
import triton.language as tl
from torch import Tensor

from workers.model.kernels.fused import empty_narrow, store_norm
from workers.model.kernels.launch import early, enter
from workers.model.kernels.linear import Narrow

#: 4-byte words of one program of a plain sum.
_SPAN = 512
#: Rows up to which a sum and the norm after it are one kernel.
_ROWS = 64


@triton.jit
def _meet(
    mine, slot, there, inboxes, turn, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """Sums of the words ``mine``, fp32, of all ranks. HALF: a word is two bf16 values, whose sums are (low, high). Inboxes are
    [2, RANKS, LIMIT] packed words; ``slot``: where among the LIMIT these are."""
    side = (turn & 1) * (RANKS * LIMIT)
    sent = (turn.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            inbox = tl.load(inboxes + peer).to(tl.pointer_type(tl.int64))
            tl.store(inbox + side + RANK * LIMIT + slot, sent, mask=there)
    low = tl.zeros((SPAN,), tl.float32)
    high = tl.zeros((SPAN,), tl.float32)
    own = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64)) + side
    for peer in tl.static_range(RANKS):
        theirs = mine
        if peer != RANK:
            come = tl.load(own + peer * LIMIT + slot, mask=there, other=0, volatile=True)
            while tl.max(((come >> 32).to(tl.int32) != turn).to(tl.int32) * there.to(tl.int32), 0) != 0:
                come = tl.load(own + peer * LIMIT + slot, mask=there, other=0, volatile=True)
            theirs = come.to(tl.int32)
        if HALF:
            low += (theirs << 16).to(tl.float32, bitcast=True)
            high += (theirs & -65536).to(tl.float32, bitcast=True)
        else:
            low += theirs.to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _bits(x):
    """fp32 ``x`` rounded to bf16, its bits in the low half of a word."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _sum(
    out, x, inboxes, turns, words, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    HALF: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    enter(EARLY)
    program = tl.program_id(0)
    turn = tl.load(turns + program) + 1
    place = program * SPAN + tl.arange(0, SPAN)
    there = place < words
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + place, mask=there, other=0)
    low, high = _meet(mine, place, there, inboxes, turn, LIMIT, RANK, RANKS, HALF, SPAN)
    total = _bits(low) | (_bits(high) << 16) if HALF else low.to(tl.int32, bitcast=True)
    tl.store(out.to(tl.pointer_type(tl.int32)) + place, total, mask=there)
    tl.store(turns + program, turn)


@triton.jit
def _sum_add_rms_norm(
    normed, scales, residual, x, weight, inboxes, turns, hidden, eps, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    NARROWS: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
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
    low, high = _meet(mine, program * SPAN + place, there, inboxes, turn, LIMIT, RANK, RANKS, True, SPAN)
    line = row * hidden + columns
    before = tl.load(residual + line, mask=within, other=0.0)
    # Rounded where it is without this kernel: the branch, then the sum.
    branch = tl.interleave(low, high).to(before.dtype).to(tl.float32)
    after = (before.to(tl.float32) + branch).to(before.dtype)
    tl.store(residual + line, after, mask=within)
    store_norm(normed, scales, row, line, after, rates, hidden, eps, within, NARROWS)
    tl.store(turns + program, turn)


class _Inboxes:
    """``programs`` × ``span`` words for each rank of ``group``, whose GPUs reach each other directly. Every rank must make the same calls
    in the same order, into one stream at a time; a captured call counts when it is replayed."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, programs: int, span: int) -> None:
        self._span, self._words, self._rank, self._ranks = span, programs * span, dist.get_rank(group), dist.get_world_size(group)
        self._inbox = symmetric.empty(2 * self._ranks * self._words, dtype=torch.int64, device=device).zero_()
        self._handle = symmetric.rendezvous(self._inbox, group=group.group_name)
        self._inboxes = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._turns = torch.zeros(programs, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody may write into an inbox that is still to be emptied


class OneShot(_Inboxes):
    """Sums of at most ``limit`` bytes of fp32 or bf16."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        super().__init__(group, device, limit // (4 * _SPAN), _SPAN)

    def takes(self, x: Tensor) -> bool:
        nbytes = x.numel() * x.element_size()
        return nbytes <= 4 * self._words and nbytes % 4 == 0 and x.dtype in (torch.bfloat16, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in memory of its own, of what it :meth:`takes`."""
        x = x.contiguous()
        words = x.numel() * x.element_size() // 4
        out = torch.empty_like(x)
        _sum[(triton.cdiv(words, _SPAN),)](
            out, x, self._inboxes, self._turns, words, LIMIT=self._words, RANK=self._rank, RANKS=self._ranks,
            HALF=x.dtype == torch.bfloat16, SPAN=_SPAN, **early(), num_warps=4,
        )  # fmt: skip
        return out


class SumNorm(_Inboxes):
    """:class:`workers.engine.comm.SumNorm` for few rows of ``hidden`` bf16 values, as one kernel."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, hidden: int) -> None:
        super().__init__(group, device, _ROWS, triton.next_power_of_2(hidden // 2))
        self._hidden = hidden

    def takes(self, branch: Tensor) -> bool:
        return branch.shape[0] <= _ROWS and branch.dtype == torch.bfloat16

    def __call__(self, residual: Tensor, branch: Tensor, weight: Tensor, eps: float, *, narrows: bool) -> Tensor | Narrow:
        found: Tensor | Narrow = (
            empty_narrow(residual.shape[0], residual.shape[1], residual.device) if narrows else torch.empty_like(residual)
        )
        values, scales = (found.values, found.scales) if isinstance(found, Narrow) else (found, found)
        _sum_add_rms_norm[(residual.shape[0],)](
            values, scales, residual, branch, weight, self._inboxes, self._turns, self._hidden, eps,
            LIMIT=self._words, RANK=self._rank, RANKS=self._ranks, NARROWS=narrows, SPAN=self._span,
            **early(), num_warps=min(max(self._span // 256, 1), 16),
        )  # fmt: skip
        return found
