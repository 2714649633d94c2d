"""One rank of bench.gpu: brings the engine up, and on rank 0 runs the workloads and prints a JSON line for each.

Run by ``bench.gpu``, under mpiexec where there are several ranks. The only argument is JSON: spec, workloads, when the process was started.
"""

from __future__ import annotations

import cProfile
import json
import logging
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.report import say
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Waiter
from workers.engines.portable import PortableEngine, PortableFollower, build
from workers.layout.quant_parts import stored_tensors
from workers.process import settle_heap
from workers.protocol.messages import GenerateTask, SamplingParams, Submit
from workers.protocol.specs import ModelSpec, ReplicaSpec
from workers.runner.device import Graphs

#: Bytes a second that are copied, counting read and written, and products a second: this GPU's own, measured at each start.
_COPIED = 4 << 30
_SIDE = 8192


class Patience:
    """Measures how long this process waits for the device, by wrapping :meth:`Waiter.until`."""

    def __init__(self) -> None:
        self.waited = 0.0
        plain = Waiter.until

        def until(waiter: Waiter, *args: Any, **named: Any) -> None:
            begin = time.perf_counter()
            try:
                plain(waiter, *args, **named)
            finally:
                self.waited += time.perf_counter() - begin

        Waiter.until = until  # type: ignore[method-assign]


class Gaps:
    """Measures how long the device is idle between two graphs of decode steps, with events around :meth:`Graphs.replay` while :meth:`seen`
    runs."""

    def __init__(self) -> None:
        self._watching, self._replays = False, list[tuple[torch.cuda.Event, torch.cuda.Event]]()
        plain = Graphs.replay

        def replay(graphs: Graphs, size: int) -> None:
            if not self._watching:
                plain(graphs, size)
                return
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            plain(graphs, size)
            end.record()
            self._replays.append((begin, end))

        Graphs.replay = replay  # type: ignore[method-assign]

    def seen(self, run: Callable[[], object]) -> int:
        """Microseconds: the median over ``run``'s steps. The gap contains a launch, messages between ranks, and any waiting."""
        self._watching = True
        run()
        torch.cuda.synchronize()
        self._watching, replays, self._replays = False, self._replays, []
        return round(statistics.median(end.elapsed_time(begin) for (_, end), (begin, _) in pairwise(replays)) * 1e3)


def rates() -> tuple[float, float]:
    """(bytes a second of a copy, FLOP a second of a bf16 product) of this GPU, on random data."""

    def best(action: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            action()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[2:])

    def copying() -> float:
        source = torch.randint(0, 255, (_COPIED,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * _COPIED / best(lambda: target.copy_(source), 7)

    def multiplying() -> float:
        a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return 2 * _SIDE**3 / best(lambda: a @ b, 12)

    found = copying(), multiplying()
    torch.cuda.empty_cache()
    return found


class Floor:
    """The minimum time of a workload: products at the measured rate or, if that takes longer, one read of every weight per decode step;
    plus one read of all cached keys and values per step."""

    def __init__(self, spec: ReplicaSpec, model: ModelSpec, quant: Any, copied: float, multiplied: float) -> None:
        parallel = spec.parallel
        tensors = stored_tensors(model, parallel, parallel.world - 1, dtype=spec.engine.dtype, quant=quant)
        self._weights = sum(each.nbytes for each in tensors if "vocab_embedding" not in each.tensor.name)
        layer = model.hidden_size * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        layer += 3 * model.hidden_size * model.widest_mlp
        self._flop_token = 2 * model.num_layers * layer
        self._kv_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
        # FP8 products run at twice the rate.
        self._multiplied = multiplied * (2 if spec.portable.options.quant == "fp8" else 1)
        self._copied, self._tp, self._pp = copied, parallel.tp, parallel.pp

    def seconds(self, requests: int, isl: int, osl: int) -> float:
        ranks = self._tp * self._pp
        prefill = requests * isl * self._flop_token / self._multiplied / ranks
        # One sequence passes through the stages one after the other; many sequences keep all stages busy, and each stage reads its weights
        # once per micro-batch.
        reads = self._weights * min(requests, self._pp) * (self._pp if requests == 1 else 1)
        cached = requests * (isl + osl / 2) * self._kv_token / ranks
        products = requests * self._flop_token / self._multiplied / ranks
        return prefill + (osl - 1) * (max(reads / self._copied, products) + cached / self._copied)


def submits(requests: int, isl: int, osl: int, vocab: int, seed: int) -> list[Submit]:
    draw = random.Random(seed)
    return [
        Submit(
            boot="bench",
            stream=i,
            attempt=0,
            client="bench",
            request_id=str(i),
            model="bench",
            prompt_ids=[draw.randrange(vocab) for _ in range(isl)],
            task=GenerateTask(params=SamplingParams(temperature=1.0, seed=seed + i, max_tokens=osl, ignore_eos=True)),
        )
        for i in range(requests)
    ]


def serve(engine: PortableEngine, requests: list[Submit], patience: Patience) -> dict[str, Any]:
    """Run all requests, submitted at once, to the end. ``host_us``: the median cost of a full decode step in this process, without
    waiting."""
    for i, submit in enumerate(requests):
        engine.submit(i, submit)
    output, ends, host = 0, 0, []
    begin = time.perf_counter()
    while engine.busy():
        start, waited = time.perf_counter(), patience.waited
        emissions = engine.step()
        if len(emissions) == len(requests):
            host.append(time.perf_counter() - start - (patience.waited - waited))
        for emission in emissions:
            output += len(emission.tokens)
            ends += emission.end is not None
    seconds = time.perf_counter() - begin
    expected = sum(submit.task.params.max_tokens for submit in requests)
    if output != expected or ends != len(requests):
        raise SystemExit(f"{output} tokens and {ends} ends came, {expected} and {len(requests)} were asked for")
    return {"seconds": seconds, "output": output, "host_us": round(statistics.median(host) * 1e6) if host else None}


def profiled(engine: PortableEngine, model: ModelSpec, patience: Patience, path: Path) -> None:
    """Tables of kernels for decodes at batch 1 and 256 and for prefill, and of the leader's own functions at batch 256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for requests, isl, osl in ((1, 128, 24), (256, 256, 16), (4, 2048, 2)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                serve(engine, submits(requests, isl, osl, model.vocab_size, 7), patience)
            table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70)
            file.write(f"{requests} requests, {isl} -> {osl}\n{table}\n")
        host = cProfile.Profile()
        with host:
            serve(engine, submits(256, 16, 64, model.vocab_size, 7), patience)
        pstats.Stats(host, stream=file).sort_stats("tottime").print_stats(30)


def lead(
    engine: PortableEngine, model: ModelSpec, arguments: dict[str, Any], spec: ReplicaSpec, floor: Floor, patience: Patience, gaps: Gaps
) -> None:
    shared = {
        "engine": "trireme",
        "gpu": torch.cuda.get_device_name(),
        "shape": spec.model,
        "tp": spec.parallel.tp,
        "pp": spec.parallel.pp,
        "quant": spec.portable.options.quant,
    }
    for name, requests, isl, osl in arguments["workloads"]:
        serve(engine, submits(min(requests, 64), isl, 4, model.vocab_size, 1), patience)
        found = serve(engine, submits(requests, isl, osl, model.vocab_size, 2), patience)
        seconds = found["seconds"]
        line = shared | {
            "workload": name,
            "requests": requests,
            "isl": isl,
            "osl": osl,
            "seconds": round(seconds, 3),
            "output_tok_s": round(found["output"] / seconds, 1),
            "total_tok_s": round((requests * isl + found["output"]) / seconds, 1),
            "ms_per_step": round(seconds / osl * 1e3, 3) if requests == 1 else None,
            "floor_share": round(floor.seconds(requests, isl, osl) / seconds, 3),
            "host_us": found["host_us"],
            "gap_us": gaps.seen(partial(serve, engine, submits(min(requests, 256), 32, 48, model.vocab_size, 3), patience)),
            "kv_tokens": engine.capacity.num_blocks * engine.capacity.block_size,
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)
    if arguments.get("profile"):
        profiled(engine, model, patience, Path(arguments["profile"]))


def main() -> None:
    arguments = json.loads(sys.argv[1])
    spec = msgspec.convert(arguments["spec"], ReplicaSpec)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(relativeCreated)6d ms %(message)s")
    comm = None
    if spec.parallel.world > 1:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    measured, begin = (0.0, 0.0), time.time()
    if arguments["workloads"] and (comm is None or comm.Get_rank() == 0):
        measured = rates()  # before the engine takes the memory
    beside = time.time() - begin
    patience, gaps = Patience(), Gaps()
    engine = build(spec, comm)
    settle_heap()
    if isinstance(engine, PortableFollower):
        engine.run()
        return
    ready_s = time.time() - arguments["started"] - beside
    print(
        json.dumps({"engine": "trireme", "shape": spec.model, "quant": spec.portable.options.quant, "ready_s": round(ready_s, 2)}),
        flush=True,
    )
    if arguments["workloads"]:
        model = open_artifact(spec.artifact, weights_optional=spec.portable.options.load_format == "dummy").model
        say(f"{torch.cuda.get_device_name()}: copies {measured[0] / 1e12:.2f} TB/s, products {measured[1] / 1e12:.0f} TFLOP/s")
        lead(engine, model, arguments, spec, Floor(spec, model, engine.capacity.quant, *measured), patience, gaps)
    engine.close()


if __name__ == "__main__":
    main()
