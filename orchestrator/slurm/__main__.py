"""Entry of every node of a Slurm job: ``python -m orchestrator.slurm``, as `deploy/slurm/serve.sbatch` calls it.

Reads the command line and the environment of the step, runs :func:`orchestrator.slurm.node.run`, and turns an error into lines and an
exit code.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from orchestrator.slurm.job_env import read_place
from orchestrator.slurm.node import JobSpec, run
from workers.protocol.errors import TriremeError


def parse(arguments: Sequence[str]) -> JobSpec:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.slurm", description="One node of a Slurm job; see deploy/slurm.")
    parser.add_argument("--name", required=True, help="name of the job")
    parser.add_argument("--jobs", required=True, help="folder of all jobs, on a shared file system")
    parser.add_argument("--file", required=True, help="deployment file")
    parser.add_argument("--lead", type=float, default=0.0, help="least seconds between Slurm's signal and the limit; 0 = no hand-over")
    parser.add_argument("--generation", type=int, default=1, help="how many jobs of this name were before, and this one")
    parser.add_argument("--mpi", default="", help="what srun --mpi=list said")
    given = parser.parse_args(arguments)
    return JobSpec(
        name=given.name,
        jobs=given.jobs,
        file=given.file,
        lead_s=given.lead,
        generation=given.generation,
        offered=offered(given.mpi),
    )


def offered(listing: str) -> tuple[str, ...]:
    """Names of the plugins in what ``srun --mpi=list`` prints: a headline, then one a line, versions of pmix in a line of their own."""
    words = [line.replace("srun:", "").strip() for line in listing.splitlines()]
    return tuple(word for word in words if word.isidentifier() and word != "none")


def main(arguments: Sequence[str] | None = None) -> int:
    spec = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(spec, read_place(os.environ), os.environ)
    except TriremeError as error:
        print(error.lines(), flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
