"""CPU that the scheduler spends on one step of decoding sequences: ``python -m bench.scheduler_step [--sequences 64] [--steps 200]``.

Prints the median microseconds of schedule, encode and update; about 100 for 64 sequences on a quiet core.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from tests.support.scheduler_rig import capacity, submit
from workers.protocol.messages import UNLIMITED, SamplingParams
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import StepResult, column, encode, view


def measure(sequences: int, steps: int) -> float:
    """Median microseconds of processor time a step; including the first steps, which compute the prompts."""
    scheduler = Scheduler(capacity(num_blocks=64 * sequences, slots=sequences, tokens=8192, context=4096, block_size=16))
    params = SamplingParams(temperature=0.0, max_tokens=4000)
    for index in range(sequences):
        scheduler.submit(index, submit([65 + index] * 50, params, credit=UNLIMITED))
    spent = []
    for _ in range(steps):
        start = time.thread_time()
        plan = scheduler.schedule()
        encode(plan)
        scheduled = time.thread_time() - start
        result = StepResult(step=plan.step, tokens=column(np.full(int(view(plan.sample).sum()), 70, dtype=np.int32)))
        start = time.thread_time()
        scheduler.update_from_output(result)
        spent.append(scheduled + time.thread_time() - start)
    return statistics.median(spent) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(f"scheduler: {measure(args.sequences, args.steps):.0f} us a step of {args.sequences} sequences")


if __name__ == "__main__":
    main()
