"""Takes the place of ssh where Open MPI starts its daemons: prints which command is to run on which node, for the gang's supervisor.

Run by mpiexec as ``python openmpi_rsh.py [OPTION...] HOST COMMAND...``; the supervisor reads mpiexec's output, which this shares. Owns
nothing and starts nothing. Run as a file and not as a module: it must cost a Python start and no import of ours.
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
    # One write: the daemons of several nodes are asked for at the same time, over one pipe.
    os.write(1, f"{PREFIX}{' '.join(words)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
