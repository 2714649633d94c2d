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

from workers.kernels.launch import early, enter

#: 4-byte words of one program of a plain sum.
_SPAN = 512


@triton.jit
def meet(
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
    low, high = meet(mine, place, there, inboxes, turn, LIMIT, RANK, RANKS, HALF, SPAN)
    total = _bits(low) | (_bits(high) << 16) if HALF else low.to(tl.int32, bitcast=True)
    tl.store(out.to(tl.pointer_type(tl.int32)) + place, total, mask=there)
    tl.store(turns + program, turn)


class Mapped:
    """``count`` zeros of ``dtype`` on each rank of ``group``, whose GPUs reach each other directly; ``addresses`` [ranks]: where they are,
    as this rank sees them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, count: int, dtype: torch.dtype) -> None:
        self._memory = symmetric.empty(count, dtype=dtype, device=device).zero_()
        self._handle = symmetric.rendezvous(self._memory, group=group.group_name)
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody may write into what is still to be emptied


class OneShotAllReduce:
    """Sums of at most ``limit`` bytes of fp32 or bf16. Every rank must make the same calls in the same order, into one stream at a time; a
    captured call counts when it is replayed."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        programs = limit // (4 * _SPAN)
        self._words = programs * _SPAN
        self._inboxes = Mapped(group, device, 2 * self._ranks * self._words, torch.int64)
        self._turns = torch.zeros(programs, dtype=torch.int32, device=device)

    def supports(self, x: Tensor) -> bool:
        nbytes = x.numel() * x.element_size()
        return nbytes <= 4 * self._words and nbytes % 4 == 0 and x.dtype in (torch.bfloat16, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in memory of its own, of what it :meth:`supports`."""
        x = x.contiguous()
        words = x.numel() * x.element_size() // 4
        out = torch.empty_like(x)
        _sum[(triton.cdiv(words, _SPAN),)](
            out, x, self._inboxes.addresses, self._turns, words, LIMIT=self._words, RANK=self._rank, RANKS=self._ranks,
            HALF=x.dtype == torch.bfloat16, SPAN=_SPAN, **early(), num_warps=4,
        )  # fmt: skip
        return out
