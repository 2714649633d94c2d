"""One replica: the ranks of an MPI world that load a model's shards and generate tokens.

This package is complete alone (``mpiexec -n 4 python -m workers ...`` speaks the wire) and never imports ``orchestrator``.
"""

__version__ = "0.2.0"
