"""Small sums over the GPUs of one host: every rank writes its words directly into the other ranks' memory, each with a round number.

Owns the receive buffers that the ranks of one group map, and the number of rounds that each of its programs has run. A word and the number
of its round are one 8-byte write, so no fence and no flag follow the data: a sum costs one transfer over the link. Sums are computed in
rank order in fp32 and rounded once, so every rank gets the same bits.

A kernel's wait for the words of its peers has no bound, like in NCCL's kernels. The leader's watchdog bounds it: it ends the replica when a
step makes no progress, and all ranks of a gang end together.

Why two halves of a receive buffer are enough: in its round k a program writes half k & 1, which its peers read in their round k - 2. It has
already received their words of round k - 1, which they wrote after their kernel of round k - 2 had ended.
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
def exchange_and_sum(
    mine, index, mask, buffers, number, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """(low, high) fp32 [SPAN]: sums over all ranks of the words ``mine`` [SPAN]. With HALF a word is two bf16 values, low and high; else it
    is one fp32 value, low.

    ``buffers``: addresses of the ranks' receive buffers, each [2, RANKS, LIMIT] int64: round number and word. ``index`` [SPAN]: positions
    of the words among the LIMIT. ``number``: the number of this round.
    """
    half = (number & 1) * (RANKS * LIMIT)
    sent = (number.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            buffer = tl.load(buffers + peer).to(tl.pointer_type(tl.int64))
            tl.store(buffer + half + RANK * LIMIT + index, sent, mask=mask)
    low = tl.zeros((SPAN,), tl.float32)
    high = tl.zeros((SPAN,), tl.float32)
    own = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64)) + half
    for peer in tl.static_range(RANKS):
        word = mine
        if peer != RANK:
            received = tl.load(own + peer * LIMIT + index, mask=mask, other=0, volatile=True)
            while tl.max(((received >> 32).to(tl.int32) != number).to(tl.int32) * mask.to(tl.int32), 0) != 0:
                received = tl.load(own + peer * LIMIT + index, mask=mask, other=0, volatile=True)
            word = received.to(tl.int32)
        if HALF:
            low += (word << 16).to(tl.float32, bitcast=True)
            high += (word & -65536).to(tl.float32, bitcast=True)
        else:
            low += word.to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _bits(x):
    """fp32 ``x`` rounded to bf16, its bits in the low half of a word."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _sum(
    out, x, buffers, numbers, words, LIMIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    HALF: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program for each SPAN words."""
    enter(EARLY)
    program = tl.program_id(0)
    number = tl.load(numbers + program) + 1
    index = program * SPAN + tl.arange(0, SPAN)
    mask = index < words
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + index, mask=mask, other=0)
    low, high = exchange_and_sum(mine, index, mask, buffers, number, LIMIT, RANK, RANKS, HALF, SPAN)
    total = _bits(low) | (_bits(high) << 16) if HALF else low.to(tl.int32, bitcast=True)
    tl.store(out.to(tl.pointer_type(tl.int32)) + index, total, mask=mask)
    tl.store(numbers + program, number)


class PeerBuffer:
    """``count`` zeros of ``dtype`` on each rank of ``group``, whose GPUs can access each other directly. ``addresses`` [ranks] int64: the
    buffer of each rank, as this rank sees it."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, count: int, dtype: torch.dtype) -> None:
        self._memory = symmetric.empty(count, dtype=dtype, device=device).zero_()
        self._handle = symmetric.rendezvous(self._memory, group=group.group_name)
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # no rank may write into a buffer before it is zeroed


class OneShotAllReduce:
    """Sums of at most ``limit`` bytes of fp32 or bf16. Every rank must make the same calls in the same order, into one stream at a time; a
    captured call counts when it is replayed."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        programs = limit // (4 * _SPAN)
        self._words = programs * _SPAN
        self._buffers = PeerBuffer(group, device, 2 * self._ranks * self._words, torch.int64)
        self._numbers = torch.zeros(programs, dtype=torch.int32, device=device)

    def supports(self, x: Tensor) -> bool:
        """Whether this operation supports ``x``."""
        nbytes = x.numel() * x.element_size()
        return nbytes <= 4 * self._words and nbytes % 4 == 0 and x.dtype in (torch.bfloat16, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, in new memory; :meth:`supports` must hold for ``x``."""
        x = x.contiguous()
        words = x.numel() * x.element_size() // 4
        out = torch.empty_like(x)
        _sum[(triton.cdiv(words, _SPAN),)](
            out, x, self._buffers.addresses, self._numbers, words, LIMIT=self._words, RANK=self._rank, RANKS=self._ranks,
            HALF=x.dtype == torch.bfloat16, SPAN=_SPAN, **early(), num_warps=4,
        )  # fmt: skip
        return out
