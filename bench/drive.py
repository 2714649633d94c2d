"""Drive the portable engine in this process (or, under mpiexec, in this world) with a fixed load and print the results as JSON.

    python -m bench.drive --artifact DIR --batch 1 --prompt 32 --output 64
    mpiexec -n 2 python -m bench.drive --artifact DIR --tp 2 ...

``--arrivals FILE``: instead of one batch, the JSON list of [arrival seconds, prompt ids, output tokens] in real time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import msgspec

from workers.engines.portable import PortableFollower, build
from workers.protocol.engine import Engine, Finish
from workers.protocol.messages import GenerateTask, SamplingParams, Submit
from workers.protocol.specs import QUANT_ALGOS, Parallel, PortableSpec, ReplicaSpec


def submit(id: int, prompt: list[int], output: int) -> Submit:
    return Submit(
        boot="bench",
        stream=id,
        attempt=1,
        client="bench",
        request_id=str(id),
        model="bench",
        prompt_ids=prompt,
        task=GenerateTask(params=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)),
    )


def run_batch(engine: Engine, batch: int, prompt: int, output: int) -> dict[str, float]:
    """Decode speed of ``batch`` equal sequences: the clock runs from the first step in which all sequences decode to the last token."""
    vocab = engine.capacity.vocab_size
    for sequence in range(batch):
        engine.submit(sequence, submit(sequence, [(7 + 31 * sequence + 17 * i) % (vocab - 64) + 32 for i in range(prompt)], output))
    begun: set[int] = set()
    tokens, start = 0, 0.0
    while engine.busy():
        for emission in engine.step():
            if len(begun) == batch:
                tokens += len(emission.tokens)
            begun.add(emission.id)
        if len(begun) == batch and not start:
            start = time.perf_counter()
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "tok_s": tokens / (time.perf_counter() - start)}


def run_arrivals(engine: Engine, arrivals: list[tuple[float, list[int], int]]) -> dict[str, float]:
    """Output tokens over the makespan (first arrival to last token) of requests that arrive at given times."""
    start = time.perf_counter()
    waiting = list(enumerate(arrivals))
    tokens = done = 0
    while done < len(arrivals):
        now = time.perf_counter() - start
        while waiting and waiting[0][1][0] <= now:
            id, (_, prompt, output) = waiting.pop(0)
            engine.submit(id, submit(id, prompt, output))
        if not engine.busy():
            time.sleep(min(0.001, max(0.0, waiting[0][1][0] - now)))
            continue
        for emission in engine.step():
            tokens += len(emission.tokens)
            done += isinstance(emission.end, Finish)
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "tok_s": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--quant", choices=QUANT_ALGOS, help="quantize the weights while they are loaded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--arrivals")
    args = parser.parse_args()
    parallel = Parallel(tp=args.tp, pp=args.pp)
    comm = None
    if parallel.world > 1:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    chosen = {"dtype": args.dtype, "threads": args.threads, "options": {"quant": args.quant}}
    engine_spec = msgspec.convert(chosen | {"max_seq_len": 2048, "kv_tokens": 32768, "prefix_cache": False}, PortableSpec)
    engine = build(ReplicaSpec(name="bench", model="bench", artifact=args.artifact, parallel=parallel, engine=engine_spec), comm)
    if isinstance(engine, PortableFollower):
        engine.run()
        return
    run_batch(engine, min(args.batch, 4), 16, 8)  # warm-up
    if args.arrivals:
        found = run_arrivals(engine, msgspec.json.decode(Path(args.arrivals).read_bytes(), type=list[tuple[float, list[int], int]]))
    else:
        found = run_batch(engine, args.batch, args.prompt, args.output)
    engine.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
