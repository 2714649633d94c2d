"""Replaces ssh when Open MPI starts its daemons: prints which command to run on which node, for the gang's supervisor.

mpiexec runs it as ``python openmpi_rsh.py [OPTION...] HOST COMMAND...``; it writes to mpiexec's output, which the supervisor reads. Owns
nothing and starts nothing. It is run as a file and not as a module, so that it costs only a Python start and no import of ours.
"""

from __future__ import annotations

import os
import sys

PREFIX = "TRIREME_LAUNCH: "


def main(words: list[str]) -> int:
    while words and words[0].startswith("-"):  # ssh's own options
        words = words[1:]
    if len(words) < 2:
        return 2
    # One write, because the requests for several nodes share one pipe at the same time.
    os.write(1, f"{PREFIX}{' '.join(words)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
