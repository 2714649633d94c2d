"""Engines for tiny models of many families on every layout, one after the other: what each layout's leader answers.

Run by ``test_families.py`` under mpiexec, with as many ranks as the largest layout has; a layout takes the first of them. Rank 0 writes
the report: by model and layout the answers, and what the cache did.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from mpi4py import MPI

from tests.reference.engine import Stream, serve
from workers.engines.portable import PortableEngine, build
from workers.protocol.messages import Submit
from workers.protocol.specs import ReplicaSpec


def answers(streams: list[Stream]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": stream.tokens,
            "logprobs": [entry.logprob for entry in stream.logprobs],
            "prompt": None if stream.prompt_logprobs is None else [entry.logprob for entry in stream.prompt_logprobs],
        }
        for stream in streams
    ]


def lead(engine: PortableEngine, together: list[Submit], in_turn: list[Submit]) -> dict[str, Any]:
    """``together``: more than the cache holds at once; ``in_turn``: one after the other, so that each finds its prefix in the cache."""
    crowded = answers(serve(engine, together))
    before = engine.stats()
    alone = [answers(serve(engine, [submit]))[0] for submit in in_turn]
    after = engine.stats()
    engine.close()
    hits = after.prefix_hits_total - before.prefix_hits_total
    return {"together": crowded, "in turn": alone, "preempted": before.preemptions_total, "hits": hits}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    world, report = MPI.COMM_WORLD, {}
    together, in_turn = (msgspec.convert(arguments[key], list[Submit]) for key in ("together", "in_turn"))
    for key, raw in arguments["specs"].items():
        spec = msgspec.convert(raw, ReplicaSpec)
        comm = world.Split(0 if world.Get_rank() < spec.parallel.world else MPI.UNDEFINED)
        begin = time.monotonic()
        if comm != MPI.COMM_NULL:
            engine = build(spec, comm if spec.parallel.world > 1 else None)  # type: ignore[arg-type]
            if isinstance(engine, PortableEngine):
                report[key] = lead(engine, together, in_turn)
            else:
                engine.run()
        if world.Get_rank() == 0:
            print(f"{key}: {time.monotonic() - begin:.1f} s", flush=True)
        everyone = world.Ibarrier()
        while not everyone.Test():
            time.sleep(0.005)  # there are more ranks than cores, and those that compute need them
    if world.Get_rank() == 0:
        Path(arguments["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
