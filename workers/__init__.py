"""One replica: the ranks of an MPI world that load a model's shards and generate tokens.

This package works without ``orchestrator`` (``mpiexec -n 4 python -m workers ...`` speaks the wire protocol) and never imports it.
"""

__version__ = "0.2.0"
