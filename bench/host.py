"""Cost of a decode step on a GPU's host: schedule, submission and results of 256 sequences, with a device that does nothing.

python -m bench.host [--runs 5] [--pause MS]

CPU seconds of the thread that drives the engine, without the graph's launch; `bench.gpu` measures it with the launch (``host_us``). Also
for one sequence, and for a load in which a sequence ends and another begins in about every step. With ``--pause`` it waits between steps
without sleeping, like for a device, so that the data of the step is no longer in the processor's caches.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

import tests.reference.device_kernels as kernels
from bench.report import Claim, publish
from tests.reference.shards import make_stage, whole_weights
from tests.support.fake_device import FakeDevice
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact
from workers.distributed.rank_groups import RankGroups
from workers.engines.portable import PortableEngine
from workers.process import settle_heap
from workers.protocol.engine import Emission
from workers.protocol.messages import Capacity, GenerateTask, SamplingParams, Submit
from workers.runner.gpu_runner import GpuRunner
from workers.runner.host_device_rings import Completion, Submissions
from workers.runner.kv_cache import KvCache
from workers.scheduler.scheduler import Scheduler

SEQUENCES, TOKENS, ASKED_US = 256, 300, 300.0
#: Steps while sequences come and go.
STEPS = 400
_VOCAB, _BLOCKS = 321, 16384


class Idle(FakeDevice):
    """A device that does nothing."""

    def capture(self, program: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


class Nothing:
    """The kernels of such a device: they compute nothing."""

    def take_submission(self, *state: object) -> None: ...

    def resolve_placeholders(self, tokens: Tensor, *state: object) -> Tensor:
        return tokens.zero_()

    def best_candidates(self, logits: Tensor, *state: object) -> Tensor:
        return logits

    def merge_candidates(self, best: Tensor) -> Tensor:
        return best

    def choose_tokens(self, *state: object) -> None: ...


def engine_of(folder: Path) -> PortableEngine:
    """An engine as on a GPU, with async scheduling, whose model computes nothing: it reads all its inputs, and all its tokens are 0."""
    Submissions._is_read = Completion.ready = lambda self: True  # type: ignore[assignment,method-assign]
    model = open_artifact(folder).model
    stage = make_stage(model, whole_weights(folder), kernels=kernels)

    def nothing(hidden: Tensor, *rest: object) -> Tensor:
        return hidden

    stage.forward = nothing  # type: ignore[method-assign,assignment]
    limits = Capacity(
        block_size=16, num_blocks=_BLOCKS, max_batch_size=512, max_num_tokens=8192, max_seq_len=1024, vocab_size=_VOCAB, tp=1, pp=1
    )
    cache = KvCache(model, stage.shard, blocks=_BLOCKS, block_size=16, dtype=stage.dtype, device=stage.device)
    runner = GpuRunner(stage, cache, Idle(), Nothing(), RankGroups(), slots=512, max_seq_len=1024, max_num_tokens=8192, depth=2)
    runner.capture()
    return PortableEngine(Scheduler(limits, async_scheduling=True), runner, limits, close=runner.close)


def request(i: int, first: int, tokens: int) -> Submit:
    """Request ``i``, whose prompt begins with ``first``. Prompts differ in length, so their blocks fill up in different steps."""
    params = SamplingParams(temperature=1.0, seed=i, max_tokens=tokens, ignore_eos=True)
    prompt = [first, *((7 * i + 3 * j) % 300 for j in range(15 + i % 16))]
    task = GenerateTask(params=params)
    return Submit(boot="b", stream=i, attempt=0, client="c", request_id=str(i), model="m", prompt_ids=prompt, task=task)


def step(engine: PortableEngine, pause_s: float) -> tuple[list[Emission], float]:
    """Wait ``pause_s``, then run a step; returns its emissions and its microseconds."""
    resume = time.monotonic() + pause_s
    while time.monotonic() < resume:
        pass
    begin = time.thread_time()
    emissions = engine.step()
    return emissions, (time.thread_time() - begin) * 1e6


def steady_us(engine: PortableEngine, sequences: int, run: int, pause_s: float) -> float:
    """Median of the steps in which each of ``sequences`` sequences yields a token. Prompts differ from ``run`` to run, so full blocks are
    published."""
    for i in range(sequences):
        engine.submit(i, request(i, run, TOKENS))
    spent = []
    while engine.busy():
        emissions, us = step(engine, pause_s)
        if len(emissions) == sequences:
            spent.append(us)
    return statistics.median(spent)


def changing_us(engine: PortableEngine, run: int, pause_s: float) -> float:
    """Mean of steps with ``SEQUENCES`` sequences, of which on average one ends per step and is replaced at once."""
    draw, ids = random.Random(run), count()

    def arrive() -> None:
        i = next(ids)
        engine.submit(i, request(i, i % 300, min(1 + int(draw.expovariate(1 / SEQUENCES)), 900)))

    for _ in range(SEQUENCES):
        arrive()
    spent = []
    for _ in range(STEPS):
        emissions, us = step(engine, pause_s)
        spent.append(us)
        for emission in emissions:
            if emission.end is not None:
                arrive()
    for i in range(next(ids)):
        engine.cancel(i)
    while engine.busy():
        engine.step()
    return statistics.mean(spent[SEQUENCES // 4 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0, metavar="MS")
    args = parser.parse_args()
    runs, pause_s = args.runs, args.pause / 1e3
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(tiny_model(Path(folder), heads=6, kv_heads=2, vocab=_VOCAB, layers=1))
        settle_heap()
        single = [steady_us(engine, 1, run, pause_s) for run in range(runs)]
        crowd = [steady_us(engine, SEQUENCES, runs + run, pause_s) for run in range(runs)]
        changing = [changing_us(engine, run, pause_s) for run in range(runs)]
    one, some = statistics.median(single), statistics.median(changing)
    detail = f"one sequence: {one:.0f} us; sequences that come and go: {some:.0f} us; without the graph's launch"
    publish(
        [
            Claim(
                name=f"host's part of a decode step at {SEQUENCES} sequences",
                unit="us",
                asked=ASKED_US,
                sense="<=",
                runs=crowd,
                detail=detail,
            )
        ]
    )


if __name__ == "__main__":
    main()
