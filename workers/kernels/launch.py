"""Early start of a step's Triton kernels: programmatic dependent launch.

On Hopper and later a kernel starts on the multiprocessors while the previous kernel still ends, and waits there. Every program of such a
kernel must call :func:`enter` before it returns, and before it accesses memory that the previous kernel reads or writes. Memory that older
kernels wrote may be read earlier: a kernel allows the next one to start only when everything before itself is complete. Correctness must
not depend on it: without it, kernels run one after the other.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def enter(EARLY: tl.constexpr):
    """Wait for everything before this kernel, and allow the next kernel to start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(addresses, nbytes, EARLY: tl.constexpr):
    """Prefetch ``nbytes`` at each of ``addresses`` into the second-level cache; both are multiples of 16."""
    if EARLY:
        sizes = tl.zeros(addresses.shape, tl.int32) + nbytes
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [addresses.to(tl.int64), sizes],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@cache
def early() -> dict[str, bool]:
    """Launch options for a kernel that calls :func:`enter` with EARLY."""
    possible = torch.cuda.is_available() and not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if possible else {"EARLY": False}
