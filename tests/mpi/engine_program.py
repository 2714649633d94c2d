"""A whole portable engine on tp * pp ranks: serves requests, idles, and closes; or fails to come up, and says the same on every rank.

Run by ``test_engine.py`` under mpiexec. Every rank writes what it saw to ``<report>.<rank>``; rank 0 the report itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec
import torch
from mpi4py import MPI

from tests.reference.engine import serve
from workers.distributed.group import Waiter
from workers.engines.portable import PortableEngine, PortableFollower, build
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Submit
from workers.protocol.specs import ReplicaSpec

IDLE_S = 2.0


def lead(engine: PortableEngine, requests: list[Submit]) -> dict:
    streams = serve(engine, requests)
    begin = time.monotonic()
    Waiter().until(lambda: time.monotonic() - begin > IDLE_S)
    again = serve(engine, requests)
    stats = engine.stats()
    engine.close()
    return {
        "tokens": [stream.tokens for stream in streams],
        "again": [stream.tokens for stream in again],
        "gaps": [[entry.top_logprobs[0] - entry.top_logprobs[1] for entry in stream.logprobs] for stream in streams],
        "free": stats.free_blocks == engine.capacity.num_blocks,
        "hits": stats.prefix_hits_total,
    }


def main() -> None:
    arguments = json.loads(sys.argv[1])
    rank = MPI.COMM_WORLD.Get_rank()
    mine = Path(f"{arguments['report']}.{rank}")
    spec = msgspec.convert(arguments["spec"], ReplicaSpec)
    try:
        engine = build(spec, MPI.COMM_WORLD)
    except TriremeError as error:
        mine.write_text(json.dumps({"code": error.code, "message": str(error)}))
        MPI.COMM_WORLD.Barrier()
        if rank == 0:
            Path(arguments["report"]).write_text("{}")
        return
    assert torch.get_num_threads() == 1
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    cpu = time.process_time()
    begin = time.monotonic()
    if isinstance(engine, PortableFollower):
        engine.run()
    else:
        requests = msgspec.convert(arguments["requests"], list[Submit])
        Path(arguments["report"]).write_text(json.dumps(lead(engine, requests)))
    mine.write_text(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - begin, "rss_mb": resident}))


if __name__ == "__main__":
    main()
