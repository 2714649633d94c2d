"""Brings up engines on this world, one after the other, and tells what each reports: its capacity, and each rank's line about its weights.

Run by ``test_plan.py``. Every rank writes its weights' bytes to ``<report>.<rank>``; rank 0 the capacities to the report itself.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import msgspec
from mpi4py import MPI

from workers.engines.portable import PortableFollower, build
from workers.protocol.specs import ReplicaSpec


class Lines(logging.Handler):
    """What the engine says at its start."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.weights: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"weights: (\d+) bytes", record.getMessage()):
            self.weights.append(int(found[1]))


def main() -> None:
    arguments = json.loads(sys.argv[1])
    lines = Lines()
    logging.getLogger("trireme.engine").setLevel(logging.INFO)
    logging.getLogger("trireme.engine").addHandler(lines)
    capacities = []
    for spec in msgspec.convert(arguments["specs"], list[ReplicaSpec]):
        engine = build(spec, MPI.COMM_WORLD)
        if isinstance(engine, PortableFollower):
            engine.run()
        else:
            capacities.append(msgspec.to_builtins(engine.capacity))
            engine.close()
    rank = MPI.COMM_WORLD.Get_rank()
    Path(f"{arguments['report']}.{rank}").write_text(json.dumps(lines.weights))
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps(capacities))


if __name__ == "__main__":
    main()
