"""How Triton kernels of a step follow each other on the device.

Owns the programmatic launch, and what a kernel may do meanwhile: on Hopper and later it is brought to the multiprocessors while the one
before it still ends, and waits there. Every program of a kernel launched so must call :func:`enter`, before it returns or touches
what the kernel before it reads or writes. Older memory may be read sooner: a kernel lets the next one be brought only when all that came
before itself is complete. Must never be relied on for order: without it kernels follow each other as always.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def enter(EARLY: tl.constexpr):
    """Wait for all that came before, and let the next kernel be brought."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def bring(places, nbytes, EARLY: tl.constexpr):
    """Ask for ``nbytes`` at each of ``places`` to come to the second-level cache; both are multiples of 16."""
    if EARLY:
        sizes = tl.zeros(places.shape, tl.int32) + nbytes
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [places.to(tl.int64), sizes],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@cache
def early() -> dict[str, bool]:
    """Options of a launch whose kernel calls :func:`enter` with EARLY."""
    possible = torch.cuda.is_available() and not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if possible else {"EARLY": False}
