"""Launchers: how a gang of MPI ranks is started, watched and killed, on this host or on a Ray cluster.

:mod:`.launcher` is the protocol, :mod:`.local_launcher` and :mod:`.ray_launcher` implement it, :mod:`.supervisor` runs the mpiexec of a
gang and everything below it.
"""
