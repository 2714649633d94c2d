"""What ranks say to each other while they come up: run by test_agreement.py on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

from workers.distributed.agreement import agree, all_or_none, broadcast, gather
from workers.protocol.errors import ConfigError, TriremeError


def raised(comm: Any, failing: dict[int, Exception]) -> list[str]:
    """What every rank raises when the ranks in ``failing`` fail inside a block, by rank: ``class: what: why``."""
    error = ""
    try:
        with all_or_none(comm):
            if (failure := failing.get(comm.Get_rank())) is not None:
                raise failure
    except TriremeError as found:
        error = f"{type(found).__name__}: {found.what}: {found.why}"
    return [data.decode() for data in gather(comm, error.encode())]


def main() -> None:
    assert "torch" not in sys.modules
    arguments, comm = json.loads(sys.argv[1]), MPI.COMM_WORLD
    rank = comm.Get_rank()
    report = {
        "broadcast": broadcast(comm, b"spec" * 1000 if rank == 0 else b"").decode(),
        "gather": [data.decode() for data in gather(comm, b"x" * rank)],
        "none": raised(comm, {}),
        "one": raised(comm, {1: ConfigError("no such layout", "tp is 3")}),
        "two": raised(comm, {1: ConfigError("first"), 2: MemoryError("no room")}),
    }
    agree(comm, None)
    if rank == 0:
        Path(arguments["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
