"""``python -m workers`` with ranks that fail on request. For tests only; nothing in the product knows of it.

    SIGUSR1         the rank falls into a loop that never lets go of the interpreter
    seed NAN + n    the sequence's logits are NaN from its eleventh token on, on every rank that holds them
    seed OOM        rank 1 is killed as the kernel kills what has no memory left
    seed HUNGRY     rank 1 allocates beyond its address-space limit

Must import neither torch nor MPI before the rank itself does: the number of threads is set in between.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
from functools import wraps
from types import FrameType
from typing import Any

from workers import rank
from workers.__main__ import main
from workers.protocol.specs import ReplicaSpec

COMMAND = (sys.executable, "-m", "tests.faults.saboteur")
NAN, OOM, HUNGRY = 2_000_000, 3_000_000, 4_000_000
#: Tokens that a NAN sequence gives before, and what HUNGRY has and asks for, bytes.
NAN_FROM, APPETITE = 10, 1 << 34


def spin(number: int, frame: FrameType | None) -> None:
    """Never returns, and holds the interpreter's lock: one call that runs in C."""
    sum(itertools.repeat(1))


def act(seed: int) -> None:
    """What the arrival of a request with this seed does to rank 1."""
    if seed == OOM:
        os.kill(os.getpid(), signal.SIGKILL)
    elif seed == HUNGRY:
        resource.setrlimit(resource.RLIMIT_AS, (APPETITE, APPETITE))
        bytearray(APPETITE)


def sabotage(me: int) -> None:
    """Change this rank's engine; it is imported by now."""
    import torch

    from workers.runner.cpu_runner import CpuRunner
    from workers.runner.sampler import Sampler

    run, sample = CpuRunner.run, Sampler.sample
    begun: dict[int, int] = {}

    @wraps(run)
    def running(self: CpuRunner, plan: Any) -> Any:
        for opened in plan.opened if me == 1 else ():
            act(opened.params.seed)
        return run(self, plan)

    @wraps(sample)
    def sampling(self: Sampler, logits: Any, inputs: Any) -> Any:
        for row, one in enumerate(inputs):
            if NAN <= one.params.seed < OOM and one.position >= begun.setdefault(one.params.seed, one.position) + NAN_FROM:
                logits[row] = torch.nan
        return sample(self, logits, inputs)

    CpuRunner.run, Sampler.sample = running, sampling  # type: ignore[method-assign]


if __name__ == "__main__":
    build = rank.build

    def sabotaged(spec: ReplicaSpec, comm: Any) -> Any:
        part = build(spec, comm)
        sabotage(comm.Get_rank())
        return part

    rank.build = sabotaged
    signal.signal(signal.SIGUSR1, spin)
    sys.exit(main(sys.argv[1:]))
